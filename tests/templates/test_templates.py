"""Each template's rendering, written out; images stand as «number»."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.errors import RowError
from pipeline.rows import Turn
from pipeline.templates import NAMES, Control, Piece, render, template
from pipeline.templates.mistral import LARGE, LLAVA

JANUS = (
    "You are a helpful language and vision assistant. You are able to understand the visual"
    " content that the user provides, and assist the user with a variety of tasks using natural"
    " language."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
CHATML = (
    "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}Q<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
ONE_IMAGE = {
    "qwen2-vl": CHATML.format("You are a helpful assistant.", "<|vision_start|>«0»<|vision_end|>"),
    "deepseek-vl2": "<｜begin▁of▁sentence｜><|User|>: «0»\nQ\n\n<|Assistant|>:",
    "janus-pro": (
        f"<｜begin▁of▁sentence｜>{JANUS}\n\n<|User|>: <begin_of_image>«0»<end_of_image>\nQ\n\n"
        "<|Assistant|>:"
    ),
    "minicpmv": CHATML.format("You are a helpful assistant.", "«0»\n"),
    "minicpmo": CHATML.format(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "«0»\n"
    ),
    "llama_3_vision": (
        f"<|begin_of_text|>{LLAMA.format('user')}«0»Q<|eot_id|>{LLAMA.format('assistant')}"
    ),
    "mistral": "<s>[INST]«0»Q[/INST]",
    "vicuna_v1.1": f"<s>{VICUNA} USER: «0»\nQ ASSISTANT:",
    "llava_llama_3": (
        f"<|begin_of_text|>{LLAMA.format('system')}{JANUS}<|eot_id|>{LLAMA.format('user')}«0»\nQ"
        f"<|eot_id|>{LLAMA.format('assistant')}"
    ),
    "chatml-llava": CHATML.format("You are a helpful assistant.", "«0»\n"),
    "gemma-it": (
        "<bos><start_of_turn>user\n\n\n<start_of_image>«0»<end_of_image>\n\nQ<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
    "kimi-vl": (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|><|media_start|>image<|media_content|>«0»<|media_end|>Q"
        "<|im_end|><|im_assistant|>assistant<|im_middle|>"
    ),
}
ONE_IMAGE["smolvlm"] = "<|im_start|>User:«0»Q<end_of_utterance>\nAssistant:"
DIALOGUE = (
    Turn("system", ("S",)),
    Turn("user", ("Q",)),
    Turn("assistant", ("A",)),
    Turn("user", ("R",)),
)
WITH_DIALOGUE = {
    "deepseek-vl2": (
        "<｜begin▁of▁sentence｜>S<|User|>: Q\n\n<|Assistant|>:A<｜end▁of▁sentence｜>"
        "<|User|>: R\n\n<|Assistant|>:"
    ),
    "smolvlm": (
        "<|im_start|>System: S<end_of_utterance>\nUser: Q<end_of_utterance>\n"
        "Assistant: A<end_of_utterance>\nUser: R<end_of_utterance>\nAssistant:"
    ),
    "mistral": "<s>[INST]Q[/INST]A</s>[INST]S\n\nR[/INST]",
    "vicuna_v1.1": "<s>S USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "gemma-it": (
        "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n"
    ),
}


def written(pieces: Sequence[Piece]) -> str:
    return "".join(f"«{piece}»" if isinstance(piece, int) else piece for piece in pieces)


def rendered(name: str, *turns: Turn) -> str:
    return written(render(template(name), turns))


@pytest.mark.parametrize("name", NAMES)
def test_one_image(name: str) -> None:
    assert rendered(name, Turn("user", (0, "Q"))) == ONE_IMAGE[name]


@pytest.mark.parametrize("name", WITH_DIALOGUE)
def test_dialogue(name: str) -> None:
    assert rendered(name, *DIALOGUE) == WITH_DIALOGUE[name]


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_sound(name: str) -> None:
    table = template(name)
    assert table.name == name
    frames = [table.user, table.assistant, table.image.replace("{image}", "{content}")]
    for frame in [*frames, *([table.system] if table.system is not None else [])]:
        assert frame.count("{content}") == 1
    assert set(table.stop) <= set(table.control)
    assert len(set(table.control)) == len(table.control)


@pytest.mark.parametrize("name", NAMES)
def test_control_pieces_are_the_templates_own(name: str) -> None:
    table = template(name)
    spoken = "".join(table.control)
    plain = [p for p in render(table, (Turn("user", ("x",)),)) if isinstance(p, Control)]
    pieces = render(table, (Turn("user", (spoken,)),))
    assert [piece for piece in pieces if isinstance(piece, Control)] == plain
    assert spoken in "".join(p for p in pieces if isinstance(p, str) and type(p) is str)
    assert all(type(one) is not str or type(two) is not str for one, two in pairs(pieces))


def pairs(pieces: Sequence[Piece]) -> list[tuple[Piece, Piece]]:
    return list(zip(pieces, pieces[1:], strict=False))


def test_several_images_and_texts_between() -> None:
    turn = Turn("user", ("a", 0, 1, "b", 2))
    assert "user\na\n«0»\n«1»\nb\n«2»<|im_end|>" in rendered("minicpmv", turn)
    assert "USER: a«0»\n«1»\nb«2» ASSISTANT:" in rendered("vicuna_v1.1", turn)


def test_contents_lose_outer_blanks_where_the_template_strips() -> None:
    turn = Turn("user", ("  a ", 0, " b\n"))
    assert "user\na\n\n<start_of_image>«0»<end_of_image>\n\nb<end" in rendered("gemma-it", turn)
    assert "user\n  a <|vision_start|>" in rendered("qwen2-vl", turn)


def test_a_content_of_one_image_and_blanks_ends_with_the_image() -> None:
    """As where the official code writes the whole text, then strips it."""
    for name in ("janus-pro", "deepseek-vl2"):
        plain = rendered(name, Turn("user", (0,)))
        assert rendered(name, Turn("user", (" ", 0, "\n "))) == plain
        assert "\n\n\n" not in plain


def test_texts_side_by_side() -> None:
    """MiniCPM's own `chat` joins all parts of a turn by line breaks; Jinja templates by nothing."""
    turns = (Turn("system", ("s", "t")), Turn("user", ("a", "b", 0)))
    assert "system\ns\nt<|im_end|>\n<|im_start|>user\na\nb\n«0»<" in rendered("minicpmv", *turns)
    assert "user\na\nb<|im_end|>" in rendered("minicpmo", Turn("user", ("a", "b")))
    assert "system\nst<|im_end|>\n<|im_start|>user\nab<|vision" in rendered("qwen2-vl", *turns)


def test_an_empty_system_text() -> None:
    """It takes the default's place; some templates then leave its frame out, as official code."""
    turns = (Turn("system", ("",)), Turn("user", ("Q",)))
    assert rendered("qwen2-vl", *turns).startswith("<|im_start|>system\n<|im_end|>\n")
    for text in ("", " \n"):
        found = rendered("janus-pro", Turn("system", (text,)), *turns[1:])
        assert found.startswith("<｜begin▁of▁sentence｜><|User|>: Q")
    assert written(render(LLAVA, turns)) == "<s>[INST] Q [/INST]"
    assert rendered("mistral", *turns) == "<s>[INST]Q[/INST]"
    assert "[SYSTEM_PROMPT][/SYSTEM_PROMPT]" in written(render(LARGE, turns))
    assert rendered("vicuna_v1.1", *turns) == "<s> USER: Q ASSISTANT:"


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("gemma-it", (Turn("user", ("a",)), Turn("user", ("b",)))),
        ("mistral", (Turn("assistant", ("a",)), Turn("user", ("b",)))),
        ("mistral", (Turn("user", ("a",)), Turn("system", ("b",)))),
        ("qwen2-vl", (Turn("tool", ("a",)),)),
        ("gemma-it", (Turn("user", ("a",)), Turn("assistant", ("a",)), Turn("system", ("b",)))),
        ("llama_3_vision", (Turn("system", ("s",)), Turn("user", (0, "b")))),
    ],
)
def test_turns_that_a_template_refuses(name: str, turns: tuple[Turn, ...]) -> None:
    with pytest.raises(RowError) as caught:
        render(template(name), turns)
    assert caught.value.code == "bad_messages"
