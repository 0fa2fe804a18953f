"""Gemma 3 gives transformers' ids, pixels, logits and tokens, in both layouts; CPU, float32."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import RowError, UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.gemma3 import spec
from pipeline.models.vision.views import render_views
from pipeline.models.vision.vit import image_patches
from pipeline.rows import Request, Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import PIXELS, TEXTS, Bench, outputs, questions
from tests.engine.test_endings import SCHEMA
from tests.engine.test_parity import ARRANGEMENTS
from tests.helpers.checkpoint_copies import copy_with_tensor, save_twin
from tests.helpers.checkpoints import write_json
from tests.helpers.families import found_family
from tests.helpers.gemma_checkpoint import (
    IDS,
    SIDE,
    SOFT,
    TOKENS,
    WINDOW,
    write_gemma3,
    write_gemma3_text,
)
from tests.helpers.label_run import label_run, start_run
from tests.helpers.parity import (
    Part,
    Prompt,
    difference,
    make_prompt,
    open_ours,
    our_logits,
    our_tokens,
    random_image,
    random_text,
)

TOLERANCE = 1e-4
START, END = IDS["<start_of_image>"], IDS["<end_of_image>"]
TURNS = {
    "text": (Turn("user", ("How many things?",)),),
    "system": (Turn("system", (" Be brief.\n",)), Turn("user", (0, " What is this? "))),
    "image first": (Turn("user", (0, "Describe this image.")),),
    "image last": (Turn("user", ("Describe: ", 0)),),
    "images between": (Turn("user", ("first\n", 0, "\nthen", 1, 2, " why? naïve 東京 ")),),
    "turns": (
        Turn("system", ("Read text.",)),
        Turn("user", ("What is\n\nthis?", 0)),
        Turn("assistant", (" A red square.\n",)),
        Turn("user", (1, "And this?")),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The hub's layout, what transformers saves of it, and a text model."""
    root = tmp_path_factory.mktemp("gemma3")
    original = write_gemma3(root / "original")
    twin = save_twin(theirs(original), original, root / "twin")
    return {"original": original, "twin": twin, "text": write_gemma3_text(root / "text")}


@cache
def theirs(folder: Path) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    kind = Gemma3ForCausalLM if folder.name == "text" else Gemma3ForConditionalGeneration
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@cache
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@cache
def processor(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Gemma3ImageProcessorPil.from_pretrained(folder)
    return Gemma3Processor(images, tokenizer, tokenizer.chat_template, image_seq_length=TOKENS)


family_of = partial(found_family, spec.Gemma3)


def messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


@pytest.mark.parametrize("name", TURNS)
def test_ids_are_the_processors(folders: dict[str, Path], name: str) -> None:
    folder, turns = folders["original"], TURNS[name]
    family = family_of(folder)
    images = [random_image(64, 48, seed) for seed in range(3)]
    count = sum(isinstance(part, int) for turn in turns for part in turn.parts)
    layouts = [family.layout(64, 48, count)] * count
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    text = processor(folder).apply_chat_template(messages(turns), add_generation_prompt=True)
    pictures = [Image.fromarray(image) for image in images[:count]] or None
    found = processor(folder)(
        images=pictures, text=text, add_special_tokens=False, return_tensors="np"
    )
    assert tokens.tolist() == found["input_ids"][0].tolist()
    assert (np.flatnonzero(tokens == START) + 1).tolist() == list(starts)
    assert np.flatnonzero(tokens == IDS[SOFT])[::TOKENS].tolist() == list(starts)


def test_a_marker_in_a_rows_text_is_text(folders: dict[str, Path]) -> None:
    family = family_of(folders["original"])
    checkpoint = Checkpoint.open(ModelSettings(id=str(folders["original"])))
    turn = Turn("user", ("What is <start_of_image><image_soft_token>?",))
    tokens, _ = family.tokenize([turn], [], Tokenizer(checkpoint, family.control))
    assert not {START, IDS[SOFT]} & set(tokens.tolist())


def test_every_image_has_the_same_tokens(folders: dict[str, Path]) -> None:
    family = family_of(folders["original"])
    sizes = np.random.default_rng(0).integers(1, 9000, (2000, 2)).tolist()
    told = processor(folders["original"])._get_num_multimodal_tokens(image_sizes=sizes)
    assert [family.layout(w, h).num_tokens for h, w in sizes] == told["num_image_tokens"]


def test_pixels_are_the_processors(folders: dict[str, Path]) -> None:
    """To 1e-6: the processor rescales and normalises in another order of roundings."""
    family = family_of(folders["original"])
    rng = np.random.default_rng(3)
    for seed, (width, height) in enumerate([*rng.integers(4, 400, (20, 2)).tolist(), [900, 4]]):
        image = random_image(width, height, seed)
        view = render_views(torch.from_numpy(image), family.layout(width, height))[0]
        made = image_patches(
            view[None], SIDE, family.image_mean, family.image_std, torch.float32
        ).view(3, SIDE, SIDE)
        pixels = processor(folders["original"]).image_processor(
            Image.fromarray(image), return_tensors="pt"
        )
        torch.testing.assert_close(made, pixels["pixel_values"][0], atol=1e-6, rtol=0)


def _image(width: int, height: int, seed: int = 0) -> list[Part]:
    return [[START], random_image(width, height, seed), [END]]


PROMPTS: dict[str, list[Part]] = {
    "text": [random_text(2 * WINDOW + 5, vocabulary=256)],
    "one image": [random_text(5, vocabulary=256), *_image(120, 90), random_text(9, 1, 256)],
    "images": [
        random_text(4, vocabulary=256),
        *_image(150, 250, 1),
        random_text(30, 2, 256),
        *_image(333, 111, 2),
        *_image(150, 250, 3),
        random_text(7, 3, 256),
    ],
    "image at both ends": [*_image(40, 60), random_text(3, vocabulary=256), *_image(112, 112)],
}


def inputs_of(folder: Path, tokens: np.ndarray, images: Any) -> dict[str, Any]:
    ids = torch.from_numpy(tokens).long()[None]
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if folder.name != "text":
        given["token_type_ids"] = (ids == IDS[SOFT]).int()
    if len(images):
        pictures = [Image.fromarray(image) for image in images]
        processed = processor(folder).image_processor(pictures, return_tensors="pt")
        given["pixel_values"] = processed["pixel_values"]
    return given


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("layout", ["original", "twin"])
@torch.inference_mode()
def test_logits(folders: dict[str, Path], layout: str, name: str) -> None:
    folder = folders[layout]
    prompt = make_prompt(ours(folder).family, PROMPTS[name])
    expected = theirs(folder)(**inputs_of(folder, prompt.tokens, prompt.images)).logits[0]
    assert difference(our_logits(ours(folder), prompt), expected) < TOLERANCE


@torch.inference_mode()
def test_logits_of_a_text_model(folders: dict[str, Path]) -> None:
    folder = folders["text"]
    prompt = Prompt(np.array(random_text(60, vocabulary=256), np.int32), (), (), ())
    expected = theirs(folder)(**inputs_of(folder, prompt.tokens, ())).logits[0]
    assert difference(our_logits(ours(folder), prompt), expected) < TOLERANCE
    with pytest.raises(RowError, match="takes no images"):
        family_of(folder).layout(10, 10)


def generated(folder: Path, tokens: np.ndarray, images: Any, count: int) -> list[int]:
    model = theirs(folder)
    model.generation_config = type(model.generation_config)()
    out = model.generate(
        **inputs_of(folder, tokens, images),
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("name", PROMPTS)
@torch.inference_mode()
def test_greedy_tokens(folders: dict[str, Path], name: str) -> None:
    folder = folders["original"]
    prompt = make_prompt(ours(folder).family, PROMPTS[name])
    expected = generated(folder, prompt.tokens, prompt.images, 16)
    assert our_tokens(ours(folder), prompt, 16) == expected


def gemma_questions(bench: Bench) -> list[Request]:
    """The usual rows, and a row whose two long questions share two images and text between."""
    made = questions(bench, rows=4, stop_token_ids=(-1,))
    pair = [random_image(90, 50, 5), random_image(50, 90, 6)]
    for number, text in enumerate((TEXTS[0] * 3, TEXTS[1] * 2)):
        made.append(bench.request(50, text, pair, f"p{number}", stop_token_ids=(-1,)))
    return made


@pytest.fixture(scope="module")
def truth(folders: dict[str, Path]) -> dict[Any, tuple[int, ...]]:
    found = {}
    for r in gemma_questions(Bench.open(folders["original"])):
        images = [PIXELS[i.image.digest] for i in r.images]
        tokens = generated(folders["original"], r.tokens, images, r.sampling.max_new_tokens)
        found[r.key] = tuple(tokens)
    return found


@pytest.mark.parametrize("engine", [{}, *ARRANGEMENTS], ids=str)
def test_the_engine_gives_the_same_tokens(
    folders: dict[str, Path], truth: dict[Any, tuple[int, ...]], engine: dict[str, Any]
) -> None:
    bench = Bench.open(folders["original"], **engine)
    assert outputs(bench.run(gemma_questions(bench))) == truth


@pytest.mark.parametrize("engine", [{}, ARRANGEMENTS[-1]], ids=str)
@torch.inference_mode()
def test_the_engines_first_logits(folders: dict[str, Path], engine: dict[str, Any]) -> None:
    """Greedy tokens alone would not notice an image whose tokens do not see each other."""
    bench = Bench.open(folders["original"], **engine)
    requests, built, rows = gemma_questions(bench), bench.engine(), []
    logits = built.model.decoder.logits
    built.model.decoder.logits = lambda *args, **options: (
        rows.append(logits(*args, **options)) or rows[-1]
    )
    bench.run(requests, built)
    found = torch.cat(rows)
    for r in requests:
        images = [PIXELS[i.image.digest] for i in r.images]
        expected = theirs(folders["original"])(
            **inputs_of(folders["original"], r.tokens, images), logits_to_keep=1
        ).logits[0]
        nearest = (found - expected).abs().amax(1).argmin()
        assert difference(found[nearest], expected[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("language_model.model.layers.1.self_attn.q_norm.weight", (7,)),
        ("language_model.model.layers.9.extra.weight", (2, 2)),
    ],
)
def test_a_wrong_tensor_is_named(
    folders: dict[str, Path], tmp_path: Path, name: str, shape: tuple[int, ...] | None
) -> None:
    broken = copy_with_tensor(folders["original"], tmp_path / "broken", name, shape)
    with pytest.raises(UserError, match=name.partition("layers.")[2] or "mm_soft_emb_norm"):
        open_ours(broken, spec.build)


def test_detection(folders: dict[str, Path]) -> None:
    config = json.loads((folders["original"] / "config.json").read_text())
    assert spec.matches(config)
    assert not spec.matches({"model_type": "gemma3", "architectures": ["Gemma3Model"]})
    assert spec.matches({k: v for k, v in config.items() if k != "architectures"})
    assert family_of(folders["original"], chat_template="gemma-it").name == "gemma3"
    with pytest.raises(UserError, match="gemma-it"):
        family_of(folders["original"], chat_template="qwen2-vl")


def test_an_embedding_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["text"].glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"use_bidirectional_attention": True})
    with pytest.raises(UserError, match="embedding model"):
        family_of(tmp_path)


def test_run(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = label_run(folders["original"], tmp_path, [(64, 48), (30, 90), (112, 112)], "gemma-it")
    assert all(row["status"] == "ok" for row in rows)
    refused = start_run(folders["original"], tmp_path, [(64, 48)], "vicuna_v1.1")
    assert refused.returncode == 2
    assert "gemma-it" in refused.stderr


@torch.inference_mode()
def test_float8_is_close(folders: dict[str, Path]) -> None:
    model = open_ours(folders["original"], spec.build)
    prompt = make_prompt(model.family, PROMPTS["one image"])
    exact = our_logits(model, prompt)
    model = open_ours(folders["original"], spec.build, quantization="fp8")
    layer = model.decoder.layers[0]
    kinds = [type(x).__name__ for x in (layer.qkv, layer.out, layer.mlp.down, layer.mlp_norm)]
    assert kinds == ["Fp8Linear", "Fp8Linear", "Fp8Linear", "Fp8RMSNorm"]
    assert difference(our_logits(model, prompt), exact) < 0.1


def test_a_schema_is_followed(folders: dict[str, Path]) -> None:
    """The tokenizer spells braces in bytes."""
    bench = Bench.open(folders["original"])
    pixels = [random_image(60, 60)]
    requests = [
        bench.request(i, "How many?", pixels, schema=SCHEMA, max_new_tokens=40) for i in range(2)
    ]
    for completion in bench.run(requests).values():
        text = bench.tokenizer.decode(completion.output_ids)
        assert completion.finish_reason == "stop", text
        assert set(json.loads(text)) == {"n"}
