"""Which family a config.json belongs to, judged by its keys, and which template it may have."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline import templates
from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.registry import FAMILIES, list_families
from pipeline.rows import Turn
from pipeline.tokenizer import Tokenizer
from tests.helpers.checkpoints import write_qwen2_5_vl, write_qwen2_vl, write_qwen3_vl
from tests.helpers.families import found_family
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

WRITERS = {"qwen2": write_qwen2_vl, "qwen2_5": write_qwen2_5_vl, "qwen3": write_qwen3_vl}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 360,
    "image_seq_length": 576,
    "text_config": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
    },
}
LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} "
    "{% endfor %}ASSISTANT:"
)


family_of = partial(found_family, Family)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("variant", WRITERS)
def test_qwen_vl(tmp_path: Path, variant: str) -> None:
    WRITERS[variant](tmp_path)
    for name in ("auto", "qwen2-vl"):
        family = family_of(tmp_path, chat_template=name)
        assert vars(family)["variant"] == variant
        assert family.fused
        assert family.num_axes == 3
        assert family.sizes.num_params > 0
    ids = special_ids()
    assert set(family.eos_token_ids) <= {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert ids["<|im_end|>"] in family.eos_token_ids


def test_the_architecture_decides_not_the_model_type(tmp_path: Path) -> None:
    write_qwen2_5_vl(tmp_path)
    rewrite(tmp_path, model_type="my_tuned_qwen")
    assert vars(family_of(tmp_path))["variant"] == "qwen2_5"
    rewrite(tmp_path, model_type="qwen2_5_vl", architectures=None)
    assert vars(family_of(tmp_path))["variant"] == "qwen2_5"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["SomethingForCausalLM"]},
        {"rope_scaling": None},
        {"vision_config": None},
        {"vision_config": {"deepstack_visual_indexes": [1]}},
        {"num_experts": 8},
    ],
)
def test_a_config_of_another_shape_is_no_qwen_vl(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_qwen2_5_vl(tmp_path)
    rewrite(tmp_path, **changes, model_type="nobody")
    with pytest.raises(UserError, match="no model family"):
        family_of(tmp_path)


@pytest.mark.parametrize("name", ["vicuna_v1.1", "qwen2_vl", ""])
def test_a_wrong_template_is_refused_with_the_right_name(tmp_path: Path, name: str) -> None:
    write_qwen2_vl(tmp_path)
    with pytest.raises(UserError, match="write 'qwen2-vl' or 'auto'"):
        family_of(tmp_path, chat_template=name)


def test_nothing_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"'bert'.*vlm-batch models"):
        family_of(tmp_path)


def test_the_listing() -> None:
    rows = list_families()
    assert len(rows) == len(FAMILIES)
    assert all(rows[0].keys() == row.keys() for row in rows)
    qwen = next(row for row in rows if row["family"] == "qwen-vl")
    assert qwen["templates"] == ["qwen2-vl"]
    assert qwen["fused"]
    assert rows[-1]["family"] == "generic"
    json.dumps(rows)
    for row in rows[:-1]:
        assert set(row["templates"]) <= set(templates.NAMES)


def write_llava(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAVA | changes))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    named = {"chat_template": LLAVA_TEMPLATE, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def test_generic_takes_what_transformers_knows(tmp_path: Path) -> None:
    write_llava(tmp_path)
    family = family_of(tmp_path)
    assert (family.name, family.fused) == ("generic", False)
    turns = (Turn("user", (0, "What? ")), Turn("assistant", ("A cat.",)), Turn("user", ("Why?",)))
    text = "<|endoftext|>user: <image>\nWhat?  assistant: A cat. user: Why? ASSISTANT:"
    assert family.prompt_text(turns) == text
    layout = family.layout(640, 480)
    assert (layout.width, layout.height, layout.num_tokens) == (640, 480, 576)
    tokens, starts = family.tokenize(turns, [layout], Tokenizer(Checkpoint("x", tmp_path)))
    assert starts == (0,)
    assert (tokens[:576] == 360).all()
    assert len(tokens) > 576


def test_generic_refuses_control_tokens_in_a_rows_text(tmp_path: Path) -> None:
    family = family_of(write_llava(tmp_path))
    with pytest.raises(RowError, match="im_end") as caught:
        family.prompt_text((Turn("user", ("a <|im_end|> b",)),))
    assert caught.value.code == "bad_prompt"


@pytest.mark.parametrize(
    "changes", [{"mm_vision_tower": "clip"}, {"architectures": ["LlavaLlamaForCausalLM"]}]
)
def test_an_original_llava_is_not_taken_for_transformers_own(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="no model family"):
        family_of(write_llava(tmp_path, **changes))
