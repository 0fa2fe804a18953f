"""Pixtral without weights, and its pixels, against mistral-common's recorded results."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.pixtral import spec
from pipeline.models.families.pixtral.model import sized
from pipeline.models.family import Family
from pipeline.models.processor import CLIP_MEAN, CLIP_STD
from pipeline.models.registry import family_for
from pipeline.models.vision.vit import image_patches
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.parity import random_image
from tests.helpers.pixtral_checkpoint import PATCH, write_mistral, write_twin
from tests.parity.pixtral_cases import IMAGES, TURNS, sizes

FOLDER = Path(__file__).parents[1] / "recorded" / "pixtral"
RECORDED = json.loads((FOLDER / "pixtral.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixtral")


@cache
def opened(folder: Path, layout: str, large: bool) -> tuple[spec.Pixtral, Tokenizer]:
    write = write_mistral if layout == "mistral" else write_twin
    path = write(folder / f"{layout}-{large}", large=large)
    settings = ModelSettings(id=str(path), chat_template="mistral")
    found = family_for(Checkpoint.open(settings), settings)
    assert isinstance(found, spec.Pixtral)
    return found, Tokenizer(Checkpoint("x", path), found.control)


@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", ["mistral", "twin"])
def test_prompts_equal_the_official_ones(folder: Path, layout: str, large: bool, case: str) -> None:
    family, tokenizer = opened(folder, layout, large)
    expected = list(RECORDED["prompts"]["large" if large else "12b"][case])
    turns = TURNS[case]
    used = [part for turn in turns for part in turn.parts if isinstance(part, int)]
    layouts = [family.layout(*IMAGES[number]) for number in used]
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    assert tokens.tolist() == expected
    assert (tokens[list(starts)] == family.image_token_id).all()


@pytest.mark.parametrize("text", ["</s>", "[INST]x[/INST]", "[IMG]", "[SYSTEM_PROMPT]"])
@pytest.mark.parametrize("large", [False, True])
def test_text_of_a_row_forges_no_control_token(folder: Path, large: bool, text: str) -> None:
    family, tokenizer = opened(folder, "mistral", large)
    ids = [tokenizer.id(token) for token in family.control]
    plain, _ = family.tokenize((Turn("user", ("a",)),), [], tokenizer)
    forged, _ = family.tokenize((Turn("user", (text,)),), [], tokenizer)
    assert np.isin(forged, ids).sum() == np.isin(plain, ids).sum()


def full_size(folder: Path, layout: str) -> spec.Pixtral:
    """A family of the true picture sizes."""
    path = folder / layout
    name = "params.json" if layout == "mistral" else "config.json"
    (write_mistral if layout == "mistral" else write_twin)(path)
    config = json.loads((path / name).read_text())
    for key in ("vision_encoder", "vision_config"):
        if key in config:
            config[key] |= {"patch_size": 16, "image_size": 1024}
    (path / name).write_text(json.dumps(config))
    (path / "preprocessor_config.json").unlink(missing_ok=True)
    settings = ModelSettings(id=str(path))
    found = family_for(Checkpoint.open(settings), settings)
    assert isinstance(found, spec.Pixtral)
    return found


def num_tokens(family: spec.Pixtral, size: tuple[int, int]) -> int:
    try:
        return family.layout(*size).num_tokens
    except RowError as error:
        assert error.code == "bad_aspect_ratio"
        return 0


def test_token_counts_equal_mistrals(tmp_path: Path) -> None:
    family, expected = full_size(tmp_path, "mistral"), RECORDED["counts"]
    found = [num_tokens(family, size) for size in sizes()]
    assert found[:50] == expected["first"]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == expected["sha256"]
    assert family.layout(1024, 768).num_tokens == 3120


def test_token_counts_equal_transformers(tmp_path: Path) -> None:
    family = full_size(tmp_path, "twin")
    for width, height in sizes():
        official: Any = get_resize_output_image_size
        image = np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))
        rows, columns = (side // 16 for side in official(image, size=1024, patch_size=16))
        # NOTE: an image without a column is one that its own processor cannot resize.
        expected = rows * (columns + 1) if rows and columns else 0
        assert num_tokens(family, (width, height)) == expected


@pytest.mark.parametrize(("name", "source"), [("smaller", (200, 130)), ("larger", (21, 13))])
def test_pixels_equal_mistrals(name: str, source: tuple[int, int]) -> None:
    """Its cubic resize, of four neighbours in float32: equal up to that type's rounding."""
    expected = torch.from_numpy(load_file(FOLDER / "pixtral.safetensors")[name])
    height, width = expected.shape[1:]
    image = torch.from_numpy(random_image(*source))
    mean, std = CLIP_MEAN, CLIP_STD
    found = image_patches(sized(image, height, width)[None], 1, mean, std, torch.float32)[0]
    torch.testing.assert_close(
        found.view(height, width, 3).permute(2, 0, 1), expected, atol=1e-5, rtol=0
    )


def test_max_pixels_limits_the_longer_side(folder: Path) -> None:
    path = folder / "twin-False"
    settings = ModelSettings(id=str(path), max_pixels=40 * 41)
    layout = family_for(Checkpoint.open(settings), settings).layout(300, 100)
    assert (layout.width, layout.height) == (40, 16)
    settings = ModelSettings(id=str(path), min_pixels=40)
    with pytest.raises(UserError, match="min_pixels"):
        family_for(Checkpoint.open(settings), settings)


def test_detection(folder: Path) -> None:
    params = json.loads((folder / "mistral-False" / "params.json").read_text())
    config = json.loads((folder / "twin-False" / "config.json").read_text())
    assert spec.matches(params)
    assert spec.matches(config)
    small = params["vision_encoder"] | {"mm_projector_id": "patch_merge", "spatial_merge_size": 2}
    assert not spec.matches(params | {"vision_encoder": small})
    assert not spec.matches({key: value for key, value in params.items() if "vision" not in key})
    clip = config["vision_config"] | {"model_type": "clip_vision_model"}
    assert not spec.matches(config | {"vision_config": clip})


def test_a_wrong_template_is_refused(folder: Path) -> None:
    settings = ModelSettings(id=str(folder / "mistral-False"), chat_template="chatml-llava")
    with pytest.raises(UserError, match="write 'mistral' or 'auto'"):
        family_for(Checkpoint.open(settings), settings)


def twin_of(folder: Path, processor: dict[str, Any]) -> Family:
    write_twin(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = ModelSettings(id=str(folder))
    return family_for(Checkpoint.open(settings), settings)


@pytest.mark.parametrize(
    ("size", "longest"),
    [({"longest_edge": 72}, 72), (72, 72), ({"height": 72, "width": 72}, 72), (None, 1024)],
    ids=str,
)
def test_the_longest_side_is_the_processors(tmp_path: Path, size: Any, longest: int) -> None:
    layout = twin_of(tmp_path, {"size": size, "patch_size": PATCH}).layout(4000, 4000)
    assert (layout.height, layout.width) == (longest, longest)


@pytest.mark.parametrize(
    "processor",
    [
        {"resample": 2, "patch_size": PATCH},
        {"do_rescale": False, "patch_size": PATCH},
        {"do_center_crop": True, "patch_size": PATCH},
        {"size": {"shortest_edge": 64}, "patch_size": PATCH},
        {"size": {"height": 64, "width": 32}, "patch_size": PATCH},
        {"patch_size": 2 * PATCH},
        {"patch_size": None},
    ],
    ids=str,
)
def test_pixels_that_are_made_otherwise_are_refused(
    tmp_path: Path, processor: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=next(iter(processor))):
        twin_of(tmp_path, processor)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    """As transformers' file says it, and as params.json does."""
    for write, key in ((write_mistral, "tied_embeddings"), (write_twin, "tie_word_embeddings")):
        path = write(tmp_path / key) / ("params.json" if "tied" in key else "config.json")
        settings = ModelSettings(id=str(path.parent))
        plain = family_for(Checkpoint.open(settings), settings).sizes.embedding_params
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: True}))
        assert family_for(Checkpoint.open(settings), settings).sizes.embedding_params * 2 == plain


@pytest.mark.parametrize("key", ["yarn", "moe", "quantization"])
def test_params_of_later_models_are_refused(tmp_path: Path, key: str) -> None:
    path = write_mistral(tmp_path) / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"factor": 2}}))
    settings = ModelSettings(id=str(tmp_path))
    with pytest.raises(UserError, match=key):
        family_for(Checkpoint.open(settings), settings)
