"""MiniCPM-V 2.6 gives its official code's ids, token counts, pixels, logits and greedy tokens.

The official numbers are recorded (`tests/helpers/recorded.py`). CPU, float32.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.models.base import DenseAttend, Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.minicpm import spec
from pipeline.models.registry import family_for
from pipeline.models.vision.navit import cells, to_patches
from pipeline.models.vision.slices import pictures
from pipeline.models.vision.views import render_views
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.checkpoint_copies import set_keys, set_tensor
from tests.helpers.minicpm_checkpoint import write_minicpm_v
from tests.helpers.parity import Prompt, difference, model_input, open_ours, our_tokens
from tests.helpers.recorded import recording
from tests.parity.minicpm_cases import CASES, Case, pixels_of, random_sizes

RECORDED = recording("minicpm_v")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minicpm_v(tmp_path_factory.mktemp("minicpm"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, ours: Model) -> Tokenizer:
    return Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), ours.family.control)


def prompt_of(case: Case, family: Any, tokenizer: Tokenizer) -> Prompt:
    images, turns = [], []
    for role, parts in case.turns:
        numbered: list[str | int] = []
        for part in parts:
            if isinstance(part, str):
                numbered.append(part)
            else:
                numbered.append(len(images))
                images.append(pixels_of(part))
        turns.append(Turn(role, tuple(numbered)))
    layouts = tuple(family.layout(i.shape[1], i.shape[0], len(images)) for i in images)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    return Prompt(tokens, tuple(images), layouts, starts)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_official_numbers(name: str, ours: Model, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(CASES[name], ours.family, tokenizer)
    assert prompt.tokens.tolist() == RECORDED.facts[name]["ids"]
    x, positions, _ = model_input(ours, prompt)
    logits = ours.decoder.logits(ours.decoder(x, positions, DenseAttend(ours.decoder.config)))
    theirs = torch.from_numpy(RECORDED.tensors[name])
    assert difference(logits[::7, ::3], theirs) < TOLERANCE
    assert our_tokens(ours, prompt, 8) == RECORDED.facts[name]["tokens"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "text only"])
def test_pixels_are_the_official_ones(name: str, ours: Any, tokenizer: Tokenizer) -> None:
    """To the bit: every slice, in the official packing of its patches, hashes alike."""
    prompt = prompt_of(CASES[name], ours.family, tokenizer)
    views = [
        to_patches(view, 14, ours.mean, ours.std)
        for image, layout in zip(prompt.images, prompt.layouts, strict=True)
        for view in render_views(torch.from_numpy(image), layout)
    ]
    patches = torch.cat(views)
    found = pictures(prompt.layouts, 14)
    assert [[p.rows, p.columns] for p in found] == RECORDED.facts[name]["grids"]
    digests = []
    for picture in found:
        own = patches[torch.from_numpy(picture.patches())].view(-1, 3, 14, 14)
        packed = own.permute(1, 2, 0, 3).reshape(3, 14, -1).numpy()
        found_bytes = np.ascontiguousarray(packed).tobytes()
        digests.append(hashlib.blake2b(found_bytes, digest_size=8).hexdigest())
    assert digests == RECORDED.facts[name]["pixels"]


def test_token_counts(ours: Model) -> None:
    layouts = [ours.family.layout(*size) for size in random_sizes()]
    number = 3  # <image_id>0</image_id>
    assert [n.num_tokens + number for n in layouts] == RECORDED.facts["counts"]
    assert all(len(ours.family.image_tokens(n)) == n.num_tokens for n in layouts)


def test_position_cells_are_the_reference_s() -> None:
    edges = torch.arange(1 / 70, 1.0, 1 / 70)
    for count in range(1, 1200):
        begins = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count, dtype=torch.int32))
        assert cells(count, 70).tolist() == torch.bucketize(begins, edges, right=True).tolist()


@torch.inference_mode()
def test_a_batch_is_its_images(ours: Model) -> None:
    rng = np.random.default_rng(0)
    sizes = [(200, 300), (640, 480), (61, 45), (480, 640), (640, 480), (1600, 300)]
    images = [torch.from_numpy(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    layouts = [ours.family.layout(w, h) for w, h in sizes]
    together = ours.encode_images(images, layouts)
    alone = [ours.encode_images([i], [n]) for i, n in zip(images, layouts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_passes_are_bounded(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [torch.zeros(768, 1024, 3, dtype=torch.uint8).random_(generator=torch.manual_seed(1))]
    layouts = [ours.family.layout(1024, 768)]
    whole = ours.encode_images(images, layouts)
    ours.planner._kept.cache_clear()
    monkeypatch.setattr("pipeline.models.vision.slices.MAX_PATCHES", 2100)
    assert len(ours.planner.plan(layouts).passes) > 1
    torch.testing.assert_close(ours.encode_images(images, layouts), whole, rtol=1e-5, atol=2e-5)
    ours.planner._kept.cache_clear()


def test_dropped_last_layer(tmp_path: Path) -> None:
    model: Any = open_ours(write_minicpm_v(tmp_path, drop_last=True), spec.build)
    assert len(model.tower.blocks.blocks) == 1


def test_older_and_newer_versions_are_not_taken(folder: Path) -> None:
    config = Checkpoint.open(ModelSettings(id=str(folder))).config
    assert spec.matches(config)
    assert not spec.matches(config | {"version": 4.5})
    assert not spec.matches({k: v for k, v in config.items() if k != "version"})
    assert not spec.matches(config | {"model_type": "minicpmo"})


def test_another_template_is_refused(folder: Path) -> None:
    settings = ModelSettings(id=str(folder), chat_template="qwen2-vl")
    with pytest.raises(UserError, match="'minicpmv'"):
        family_for(Checkpoint.open(settings), settings)


def test_text_cannot_forge_an_image(ours: Model, tokenizer: Tokenizer) -> None:
    turn = Turn("user", ("<image><unk></image>",))
    tokens, starts = ours.family.tokenize([turn], [], tokenizer)
    assert not starts
    assert ours.family.image_token_id not in tokens


def test_tokens_that_only_the_tokenizers_config_adds(folder: Path, tmp_path: Path) -> None:
    """As transformers completes a tokenizer.json; `<unk>` may stand in the vocabulary."""
    spec_, config = (
        json.loads((folder / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    late = [t for t in spec_["added_tokens"] if t["content"] in ("<image_id>", "<unk>", "<slice>")]
    kept = [token for token in spec_["added_tokens"] if token not in late]
    spec_["added_tokens"] = kept
    (unknown,) = (token["id"] for token in late if token["content"] == "<unk>")
    spec_["model"]["vocab"]["<unk>"] = unknown
    config["added_tokens_decoder"] = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in late
    }
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec_))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    settings = ModelSettings(id=str(tmp_path))
    checkpoint = Checkpoint.open(settings)
    family = spec.build(checkpoint, settings)
    assert family.image_token_id == unknown
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "<image_id>0</image_id><image><unk></image><slice>"
    ours = Tokenizer(checkpoint, family.control)
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode("<unk>") != [unknown]


def test_limits_of_pixels(folder: Path) -> None:
    def family(**limits: int) -> Any:
        settings = ModelSettings(id=str(folder), **limits)
        return family_for(Checkpoint.open(settings), settings)

    assert family(max_pixels=4 * 448**2).layout(3000, 3000).grid == (1, 2, 2)
    assert family(max_pixels=448**2).layout(3000, 3000).grid == (1, 0, 0)
    with pytest.raises(UserError, match="at least 200704"):
        family(max_pixels=448**2 - 1)
    with pytest.raises(UserError, match="min_pixels"):
        family(min_pixels=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice_mode": False}, "slice_mode"),
        ({"image_feature_size": 9}, "not those of config.json"),
        ({"patch_size": 16}, "not those of config.json"),
    ],
)
def test_processors_that_do_not_fit(tmp_path: Path, changes: Any, message: str) -> None:
    set_keys(write_minicpm_v(tmp_path), "preprocessor_config.json", **changes)
    with pytest.raises(UserError, match=message):
        spec.build(Checkpoint.open(ModelSettings(id=str(tmp_path))), ModelSettings(id="x"))


def test_decoders_of_another_kind(tmp_path: Path) -> None:
    folder = set_tensor(write_minicpm_v(tmp_path), "llm.lm_head.weight", None)
    set_keys(folder, "config.json", tie_word_embeddings=True)
    assert open_ours(folder, spec.build).decoder.config.tied
    set_keys(folder, "config.json", use_sliding_window=True)
    with pytest.raises(UserError, match="use_sliding_window"):
        open_ours(folder, spec.build)
