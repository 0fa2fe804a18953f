"""Kimi-VL gives the official ids, pixels and features, and transformers' logits on top of them."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import RowError, UserError
from pipeline.kernels.patchify import patchify
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.kimi_vl import spec
from pipeline.models.layers import Linear
from pipeline.models.vision.moonvit import _halved
from pipeline.models.vision.views import render_view
from pipeline.models.vision.vit import VitConfig
from pipeline.rows import ImageLayout, Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import PIXELS, Bench, outputs, questions
from tests.helpers.checkpoint_copies import set_tensor
from tests.helpers.families import found_family
from tests.helpers.kimi_vl_checkpoint import (
    FIRST,
    IDS,
    PATCH,
    TEXT,
    VISION,
    tensors_of,
    write_kimi_vl,
)
from tests.helpers.label_run import label_run, start_run
from tests.helpers.parity import (
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
SIZES = [(64, 48), (33, 90), (28, 28), (300, 170), (7, 5)]  # as recorded
TURNS = {
    "text": (Turn("system", ("S.",)), Turn("user", ("How many?",))),
    "image": (Turn("user", (0, "Describe this image.")),),
    "between": (Turn("user", ("first ", 0, " then ", 1, 2, " why ")),),
    "turns": (
        Turn("user", (0, "What is it?")),
        Turn("assistant", ("A red square.",)),
        Turn("user", ("And here? 東京",)),
    ),
}
TEXTS = [
    "A user's HTTP server: don't WE'LL stop?",
    "  two  blanks  and\ttab \n\n next\r\n",
    "naïve Größe 东京abc東京 12 123 12345",
    "Describe the IMAGE in detail… <|im_end|>!",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kimi_vl(tmp_path_factory.mktemp("kimi_vl"))


@cache
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@cache
def their_decoder() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**TEXT, num_mtp_layers=0, attn_implementation="eager")
    model = DeepseekV3ForCausalLM(config).eval()
    tensors = {
        name.removeprefix("language_model."): torch.from_numpy(tensor)
        for name, tensor in tensors_of().items()
        if name.startswith("language_model.")
    }
    model.load_state_dict(_stacked(tensors))
    return model


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps a layer's experts in two tensors."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(TEXT["first_k_dense_replace"], TEXT["num_hidden_layers"]):
        stem = f"model.layers.{i}.mlp.experts"
        experts = range(TEXT["n_routed_experts"])
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{e}.{part}_proj.weight"] for e in experts])
            for part in ("gate", "up", "down")
        )
        out |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    return out


family_of = partial(found_family, spec.KimiVL)


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family_of(folder).control)


def test_texts_are_cut_as_by_the_official_tokenizer(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    for text, ids in zip(TEXTS, recording("kimi_vl").facts["texts"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.size == FIRST + 256


@pytest.mark.parametrize("name", TURNS)
def test_ids_are_the_official_ones(folder: Path, name: str) -> None:
    """Recorded with three placeholders an image."""
    block = ImageLayout(PATCH, PATCH, (1, 1, 1), 3)
    tokens, starts = family_of(folder).tokenize(TURNS[name], [block] * 3, tokenizer_of(folder))
    assert tokens.tolist() == recording("kimi_vl").facts[name]
    assert all(tokens[start] == IDS["<|media_pad|>"] for start in starts)


def test_grids_are_the_official_ones(folder: Path) -> None:
    """2,000 sizes under the real limit, extreme ratios among them."""
    family = family_of(folder)
    family.max_patches = 4096
    grids = recording("kimi_vl").tensors["sizes"]
    rng = np.random.default_rng(11)
    sizes = np.exp(rng.uniform(0, np.log(8000), (len(grids), 2))).astype(int)
    for (width, height), (rows, columns) in zip(sizes.tolist(), grids, strict=True):
        if rows == 0:
            with pytest.raises(RowError, match="511 patches"):
                family.layout(width, height)
            continue
        layout = family.layout(width, height)
        assert layout.grid == (1, rows, columns)
        assert layout.num_tokens == rows * columns // 4
    known = {(1024, 768): 1036, (1920, 1080): 1032, (1000, 1000): 1089, (448, 448): 256}
    for size, count in known.items():
        assert family.layout(*size).num_tokens == count


def pictures() -> list[np.ndarray]:
    return [random_image(w, h, seed) for seed, (w, h) in enumerate(SIZES)]


def test_pixels_are_the_official_ones(folder: Path) -> None:
    """To the bit, before they are normalised."""
    family, recorded = family_of(folder), recording("kimi_vl").tensors
    made = []
    for image in pictures():
        layout = family.layout(image.shape[1], image.shape[0])
        picture = render_view(torch.from_numpy(image), layout.views[0])
        zero, one = (0.0,) * 3, (1.0,) * 3
        made.append(patchify([picture], PATCH, 1, 1, zero, one, torch.float32) * 255)
    levels = torch.cat(made).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(levels.reshape(recorded["levels"].shape), recorded["levels"])
    grids = [family.layout(w, h).grid[1:] for w, h in SIZES]
    np.testing.assert_array_equal(np.array(grids), recorded["grid"])


@torch.inference_mode()
def test_features_are_the_official_ones(folder: Path) -> None:
    model = ours(folder)
    layouts = [model.family.layout(w, h) for w, h in SIZES]
    found = model.encode_images([torch.from_numpy(p) for p in pictures()], layouts)
    expected = torch.from_numpy(recording("kimi_vl").tensors["features"])
    assert difference(found, expected) < TOLERANCE


def their_input(tokens: np.ndarray, features: torch.Tensor) -> torch.Tensor:
    ids = torch.from_numpy(tokens.astype(np.int64))
    x = their_decoder().get_input_embeddings()(ids)
    x[ids == IDS["<|media_pad|>"]] = features
    return x[None]


@torch.inference_mode()
def test_logits_and_tokens_on_the_official_features(folder: Path) -> None:
    model = ours(folder)
    first, *rest = pictures()[:3]
    parts = [random_text(4), first, random_text(3, 2), *rest, random_text(5, 3)]
    prompt = make_prompt(model.family, parts)
    count = sum(layout.num_tokens for layout in prompt.layouts)
    features = torch.from_numpy(recording("kimi_vl").tensors["features"][:count])
    x = their_input(prompt.tokens, features)
    assert difference(our_logits(model, prompt), their_decoder()(inputs_embeds=x).logits[0]) < (
        TOLERANCE
    )
    tokens = their_decoder().generate(
        inputs_embeds=x, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert our_tokens(model, prompt, 12) == tokens[0].tolist()


@torch.inference_mode()
def test_engine_gives_the_reference_tokens(folder: Path) -> None:
    bench, model = Bench.open(folder), ours(folder)
    requests = questions(bench)
    found = outputs(bench.run(requests))
    stops = set(bench.family.eos_token_ids)
    for request in requests:
        images = [torch.from_numpy(PIXELS[i.image.digest]) for i in request.images]
        features = torch.zeros(0, model.feature_size)
        if images:
            features = model.encode_images(images, [i.layout for i in request.images])
        x = their_input(request.tokens, features)
        expected = their_decoder().generate(
            inputs_embeds=x, max_new_tokens=12, do_sample=False, eos_token_id=list(stops),
            pad_token_id=0,
        )[0].tolist()  # fmt: skip
        if expected and expected[-1] in stops:
            expected.pop()
        assert list(found[request.key]) == expected


@pytest.mark.parametrize(
    "engine",
    [{"decode_slots": 1}, {"share_images": False}, {"share_prefix": False, "overlap": False}],
    ids=str,
)
def test_arrangements_give_the_same_tokens(folder: Path, engine: dict[str, Any]) -> None:
    plain, other = Bench.open(folder), Bench.open(folder, **engine)
    assert outputs(other.run(questions(other))) == outputs(plain.run(questions(plain)))


def test_detection(folder: Path) -> None:
    for name in ("auto", "kimi-vl"):
        family = family_of(folder, chat_template=name)
        assert set(family.eos_token_ids) == {IDS["[EOS]"], IDS["<|im_end|>"]}
        assert family.image_token_id == IDS["<|media_pad|>"]
        assert family.sizes.kv_values_per_token == 3 * (32 + 8)
    with pytest.raises(UserError, match="write 'kimi-vl' or 'auto'"):
        family_of(folder, chat_template="qwen2-vl")
    config = Checkpoint.open(ModelSettings(id=str(folder))).config
    assert not spec.matches(config | {"vision_config": {"model_type": "kimi_k25_vision"}})


def test_limits_of_pixels(folder: Path) -> None:
    assert family_of(folder, max_pixels=28**2).layout(500, 500).num_tokens == 1
    assert family_of(folder, max_pixels=10**9).layout(500, 500) == family_of(folder).layout(
        500, 500
    )
    with pytest.raises(UserError, match="784 or more"):
        family_of(folder, max_pixels=28**2 - 1)
    with pytest.raises(UserError, match="min_pixels"):
        family_of(folder, min_pixels=100)


def test_pictures_too_long(folder: Path) -> None:
    with pytest.raises(RowError) as caught:
        family_of(folder).layout(8000, 13)
    assert caught.value.code == "bad_aspect_ratio"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("multi_modal_projector.pre_norm.bias", None, "lacks the tensor"),
        ("vision_tower.patch_embed.pos_emb.weight", (6, 5, 48), r"has shape \(6, 5, 48\)"),
        ("vision_tower.encoder.blocks.2.wo.bias", (48,), "no place for"),
        ("language_model.model.layers.3.input_layernorm.weight", (64,), "no place for"),
    ],
)
def test_wrong_tensors(tmp_path: Path, name: str, shape: Any, message: str) -> None:
    folder = set_tensor(write_kimi_vl(tmp_path), name, shape)
    with pytest.raises(UserError, match=message):
        open_ours(folder, spec.build)


def test_run(folder: Path, tmp_path: Path) -> None:
    rows = label_run(folder, tmp_path, [(64, 48), (30, 90), (8000, 10), (50, 50)])
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]


def test_run_with_a_wrong_template(folder: Path, tmp_path: Path) -> None:
    ended = start_run(folder, tmp_path, [(8, 8)], template="deepseek-vl2")
    assert ended.returncode == 2
    assert "kimi-vl" in ended.stderr


def test_rotary_pairs_of_small_heads() -> None:
    """Queries' and keys' rows go pair by pair, the values' stay."""
    for dim in (4, 8):
        rows = torch.arange(3.0 * 2 * dim)
        config = VitConfig(1, 2 * dim, 2, 4, PATCH, 6 * PATCH)
        turned = _halved(Linear(rows[:, None], rows), config).bias
        q, k, v = turned.view(3, 2, 2, dim // 2)
        expected = rows.view(3, 2, dim // 2, 2).transpose(2, 3)
        assert torch.equal(torch.stack([q, k]), expected[:2])
        assert torch.equal(v.flatten(), rows[4 * dim :])


def test_heads_that_cannot_be_turned(tmp_path: Path) -> None:
    folder = write_kimi_vl(tmp_path, vision_config=VISION | {"num_attention_heads": 8})
    with pytest.raises(UserError, match="multiple of 4"):
        open_ours(folder, spec.build)
