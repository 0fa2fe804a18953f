"""Janus-Pro gives the official ids, pixels, logits and tokens, in both layouts; CPU, float32."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.janus import spec
from pipeline.models.vision.views import render_view
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import PIXELS, Bench, outputs, questions
from tests.helpers.checkpoint_copies import set_keys, set_tensor
from tests.helpers.families import found_family
from tests.helpers.janus_checkpoint import (
    GRID,
    IDS,
    SIDE,
    converted_config,
    original_config,
    write_janus,
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
from tests.helpers.recorded import recording

TOLERANCE = 1e-4
LAYOUTS = ("original", "pickled", "twin")
TURNS = {
    "text": (Turn("system", ("You count things.",)), Turn("user", ("How many things are there?",))),
    "image": (Turn("user", (0, "Describe this image.")),),
    "two images": (Turn("user", (0, 1, "Which one?")),),
    "between": (Turn("user", ("first ", 0, "then ", 1, " say why ")),),
    "turns": (
        Turn("system", ("Be brief\nand kind.",)),
        Turn("user", (0, "  What is it?\n")),
        Turn("assistant", (" A red square. ",)),
        Turn("user", ("And here? naïve 東京",)),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("janus")
    return {
        "original": write_janus(root / "original"),
        "pickled": write_janus(root / "pickled", pickled=True),
        "twin": write_janus(root / "twin", twin=True),
    }


@cache
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@cache
def theirs(folder: Path) -> Any:
    from transformers import JanusForConditionalGeneration

    model, report = JanusForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    missing = [n for n in report["missing_keys"] if "vqmodel" not in n and "generation_" not in n]
    assert not missing
    assert not report["unexpected_keys"]
    return model.eval()


def their_pixels(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    return JanusImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt").pixel_values


family_of = partial(found_family, spec.Janus)


@pytest.mark.parametrize("name", TURNS)
def test_ids_are_the_official_ones(folders: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(ModelSettings(id=str(folders["original"])))
    family = family_of(folders["original"])
    layouts = [family.layout(64, 48)] * 2
    tokenizer = Tokenizer(checkpoint, family.control)
    tokens, starts = family.tokenize(TURNS[name], layouts, tokenizer)
    assert tokens.tolist() == recording("janus").facts[name]
    for start in starts:
        assert set(tokens[start : start + GRID**2]) == {IDS["<image_placeholder>"]}


def test_markers_may_be_ordinary_tokens(tmp_path: Path) -> None:
    """The official code splices them in by id, whatever the tokenizer would cut."""
    folder = write_janus(tmp_path)
    file = folder / "tokenizer.json"
    tokens = json.loads(file.read_text("utf-8"))
    moved = [e for e in tokens["added_tokens"] if "image" in e["content"]]
    assert len(moved) == 3
    tokens["model"]["vocab"] |= {e["content"]: e["id"] for e in tokens["added_tokens"]}
    tokens["added_tokens"] = [e for e in tokens["added_tokens"] if e not in moved]
    file.write_text(json.dumps(tokens), "utf-8")
    family = family_of(folder)
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    found = family.tokenize(TURNS["between"], [family.layout(64, 48)] * 2, tokenizer)[0]
    assert found.tolist() == recording("janus").facts["between"]


def test_pixels_are_the_official_ones(folders: dict[str, Path]) -> None:
    """To the bit: the original processor, which cuts fractions of a pixel off."""
    family = family_of(folders["original"])
    levels = recording("janus").tensors["levels"]
    sizes = [(64, 48), (33, 90), (48, 48), (301, 117), (7, 5), (400, 3)]
    for seed, ((width, height), expected) in enumerate(zip(sizes, levels, strict=True)):
        layout = family.layout(width, height)
        made = render_view(torch.from_numpy(random_image(width, height, seed)), layout.views[0])
        np.testing.assert_array_equal(made.numpy(), expected.transpose(1, 2, 0))


def test_pixels_of_the_twin_are_the_processors(folders: dict[str, Path]) -> None:
    """transformers' processor rounds instead."""
    family = family_of(folders["twin"])
    rng = np.random.default_rng(3)
    for seed, (width, height) in enumerate(rng.integers(4, 120, (40, 2)).tolist()):
        image = random_image(width, height, seed)
        view = family.layout(width, height).views[0]
        made = render_view(torch.from_numpy(image), view).float() / 255
        expected = their_pixels(folders["twin"], [Image.fromarray(image)])[0].permute(1, 2, 0)
        torch.testing.assert_close((made - 0.5) / 0.5, expected, atol=1e-6, rtol=0)


def test_every_image_has_the_same_tokens(folders: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    for layout in ("original", "twin"):
        family = family_of(folders[layout])
        for width, height in rng.integers(1, 9000, (1000, 2)).tolist():
            made = family.layout(width, height, 3)
            (view,) = made.views
            assert made.num_tokens == GRID**2
            assert (view.height, view.width) == (SIDE, SIDE)
            assert max(view.resized) == SIDE
            assert all(o + r <= SIDE for o, r in zip(view.offset, view.resized, strict=True))


def official_prompt(model: Model) -> Prompt:
    """The recorded prompt "between" with its two pictures."""
    ids = recording("janus").facts["between"]
    marker = IDS["<image_placeholder>"]
    parts: list[Part] = []
    pictures = iter([random_image(64, 48, 0), random_image(33, 90, 1)])
    at = 0
    while at < len(ids):
        if ids[at] == marker:
            parts.append(next(pictures))
            at += GRID**2
        else:
            parts.append([ids[at]])
            at += 1
    return make_prompt(model.family, parts)


@pytest.mark.parametrize("layout", ["original", "pickled"])
@torch.inference_mode()
def test_logits_and_tokens_are_the_official_ones(folders: dict[str, Path], layout: str) -> None:
    model, recorded = ours(folders[layout]), recording("janus").tensors
    prompt = official_prompt(model)
    assert prompt.tokens.tolist() == recording("janus").facts["between"]
    expected = torch.from_numpy(recorded["logits"])
    assert difference(our_logits(model, prompt)[-len(expected) :], expected) < TOLERANCE
    assert our_tokens(model, prompt, len(recorded["tokens"])) == recorded["tokens"].tolist()


PROMPTS: dict[str, list[Part]] = {
    "text only": [random_text(23)],
    "one image": [random_text(5), random_image(90, 61, 1), random_text(9, 1)],
    "two images": [
        random_text(4), random_image(48, 48, 2), random_text(3, 2), random_image(20, 70, 3),
        random_text(7, 3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
@torch.inference_mode()
def test_logits_of_the_twin(folders: dict[str, Path], name: str) -> None:
    model = ours(folders["twin"])
    prompt = make_prompt(model.family, PROMPTS[name])
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(prompt.tokens).long()[None]}
    if prompt.images:
        pictures = [Image.fromarray(image) for image in prompt.images]
        inputs["pixel_values"] = their_pixels(folders["twin"], pictures)
    expected = theirs(folders["twin"])(**inputs).logits[0]
    assert difference(our_logits(model, prompt), expected) < TOLERANCE


def test_engine_gives_the_reference_tokens(folders: dict[str, Path]) -> None:
    bench = Bench.open(folders["twin"])
    requests = questions(bench)
    found = outputs(bench.run(requests))
    for request in requests:
        tokens = torch.from_numpy(request.tokens.astype(np.int64))[None]
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if request.images:
            pictures = [Image.fromarray(PIXELS[i.image.digest]) for i in request.images]
            inputs["pixel_values"] = their_pixels(folders["twin"], pictures)
        stop = request.sampling.stop_token_ids[0]
        out = (
            theirs(folders["twin"])
            .generate(
                **inputs, do_sample=False, max_new_tokens=12, eos_token_id=stop, pad_token_id=stop
            )[0, tokens.shape[1] :]
            .tolist()
        )
        expected = tuple(out[:-1] if out and out[-1] == stop else out)
        assert found[request.key] == expected


@pytest.mark.parametrize(
    "engine",
    [{"decode_slots": 1}, {"share_images": False}, {"share_prefix": False, "overlap": False}],
    ids=str,
)
def test_arrangements_give_the_same_tokens(folders: dict[str, Path], engine: dict) -> None:
    plain, other = Bench.open(folders["original"]), Bench.open(folders["original"], **engine)
    assert outputs(other.run(questions(other))) == outputs(plain.run(questions(plain)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_detection(folders: dict[str, Path], layout: str) -> None:
    for name in ("auto", "janus-pro"):
        family = family_of(folders[layout], chat_template=name)
        assert family.converted == (layout == "twin")
        assert family.eos_token_ids == (IDS["<｜end▁of▁sentence｜>"],)
        assert family.context_length == 2048
        assert family.sizes.num_params > 0
    with pytest.raises(UserError, match="write 'janus-pro' or 'auto'"):
        family_of(folders[layout], chat_template="qwen2-vl")


@pytest.mark.parametrize("limit", ["min_pixels", "max_pixels"])
def test_limits_of_pixels_are_refused(folders: dict[str, Path], limit: str) -> None:
    with pytest.raises(UserError, match="pixels null"):
        family_of(folders["original"], **{limit: 90_000})


def test_deepseek_vl_is_not_taken(folders: dict[str, Path]) -> None:
    config = dict(Checkpoint.open(ModelSettings(id=str(folders["original"]))).config)
    assert spec.matches(config)
    del config["gen_vision_config"]
    assert not spec.matches(config)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("aligner.layers.2.bias", None, r"lacks the tensor 'aligner.layers.2.bias'"),
        ("language_model.model.surprise", (3,), r"no place for: 'language_model.model.surprise'"),
        ("vision_model.vision_tower.norm.bias", (5,), r"norm.bias' has shape \(5,\)"),
    ],
)
def test_wrong_tensors(tmp_path: Path, name: str, shape: Any, message: str) -> None:
    folder = set_tensor(write_janus(tmp_path), name, shape)
    with pytest.raises(UserError, match=message):
        open_ours(folder, spec.build)


def test_run(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = label_run(folders["original"], tmp_path, [(64, 48), (30, 90), (50, 50)])
    for row in rows:
        assert row["status"] == "ok"
        assert row["caption"] is not None


def test_run_with_a_wrong_template(folders: dict[str, Path], tmp_path: Path) -> None:
    ended = start_run(folders["original"], tmp_path, [(8, 8)], template="gemma-it")
    assert ended.returncode == 2
    assert "janus-pro" in ended.stderr


@pytest.mark.parametrize("layout", ["original", "twin"])
def test_pixels_by_other_factors(tmp_path: Path, layout: str) -> None:
    """Bytes are scaled, and normalised or not, as the processor says."""
    folder = write_janus(tmp_path, twin=layout == "twin")
    file = "preprocessor_config.json"
    family = family_of(set_keys(folder, file, rescale_factor=1 / 127.5))
    assert family.image_mean == pytest.approx((0.25,) * 3)
    assert family.image_std == pytest.approx((0.25,) * 3)
    family = family_of(set_keys(folder, file, rescale_factor=1 / 255, do_normalize=False))
    assert (family.image_mean, family.image_std) == ((0.0,) * 3, (1.0,) * 3)
    assert family.background == (127, 127, 127)
    with pytest.raises(UserError, match="bicubic"):
        family_of(set_keys(folder, file, resample=2))


def test_prompts_of_another_kind(tmp_path: Path) -> None:
    folder = set_keys(write_janus(tmp_path), "processor_config.json", sft_format="plain")
    with pytest.raises(UserError, match="sft_format"):
        family_of(folder)


@torch.inference_mode()
def test_converted_towers_of_another_kind(tmp_path: Path) -> None:
    """The norms' epsilon and the activation, which is the aligner's too."""
    config = converted_config()
    config["vision_config"] |= {"layer_norm_eps": 0.01, "hidden_act": "relu"}
    folder = write_janus(tmp_path, twin=True, **config)
    model, image = ours(folder), random_image(64, 48)
    prompt = make_prompt(model.family, [random_text(4), image])
    inputs = {"input_ids": torch.from_numpy(prompt.tokens.astype(np.int64))[None]}
    inputs["pixel_values"] = their_pixels(folder, [Image.fromarray(image)])
    expected = theirs(folder)(**inputs).logits[0]
    assert difference(our_logits(model, prompt), expected) < TOLERANCE


def test_original_towers(tmp_path: Path) -> None:
    """Left out, the layer is the last but one; a head may be the embedding's."""
    config = original_config()
    vision = config["vision_config"]["params"]
    del vision["select_layer"]
    assert spec.tower_sizes(config).layers == vision["layers"] - 1
    tied = {"language_config": config["language_config"] | {"tie_word_embeddings": True}}
    folder = set_tensor(write_janus(tmp_path, **tied), "language_model.lm_head.weight", None)
    decoder = open_ours(folder, spec.build).decoder
    assert decoder.config.tied
    vision["pixel_mean"] = vision["pixel_std"] = [0.5] * 3
    with pytest.raises(UserError, match="normalises pixels"):
        spec.tower_sizes(config)
