"""Published sizes: every family builds at them, as many values as the hub counts, each once."""

from __future__ import annotations

from dataclasses import astuple
from math import prod
from pathlib import Path

import pytest
import torch

from pipeline.estimate import least_card_gb
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.deepseek_vl2 import spec
from pipeline.models.families.qwen_vl.spec import _sizes as qwen_sizes
from pipeline.models.family import ModelSizes
from pipeline.models.registry import FAMILIES, Entry, family_for
from pipeline.models.vision import views
from pipeline.settings import ModelSettings
from scripts.bench import published
from scripts.bench.limits import work_of_sizes
from tests.helpers.deepseek_vl2_checkpoint import IDS
from tests.helpers.parity import open_ours
from tests.planner.test_estimate import BIG, BIG_VISION

CLIP_UNUSED = 12_596_224 + 2048
PARAMETERS = {
    "deepseek-vl2": 27_464_895_896,
    "deepseek-vl2-small": 16_243_211_632,
    "deepseek-vl2-tiny": 3_355_263_088,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "llama-3.2-11b-vision": 10_670_220_835,
    "llama-3.2-90b-vision": 88_593_355_323,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen3-vl-8b": 8_767_123_696,
    "minicpm-v-2.6": 8_099_175_152,
    "minicpm-o-2.6": 8_423_157_488,  # without the speech synthesis
    "smolvlm2-2.2b": 2_246_784_880,
    "janus-pro-1b": 1_962_640_384,  # without the generation of images
    "janus-pro-7b": 7_235_034_112,
    "kimi-vl-a3b": 16_407_656_048,
    # As the hub counts, without what is never used: CLIP's last block, the towers' last norms.
    "llava-v1.5-13b": 13_350_839_296 - CLIP_UNUSED,
    "llava-v1.6-vicuna-7b": 7_062_906_880 - CLIP_UNUSED,
    "llama3-llava-next-8b": 8_354_752_512 - CLIP_UNUSED,
    "llava-next-72b": 72_666_949_632 - CLIP_UNUSED,
    "llava-onevision-qwen2-7b": 8_030_348_832 - 2304,
    "pixtral-12b": 12_682_739_712,
    "pixtral-large": 124_134_845_824,
}


@pytest.mark.parametrize("name", published.names())
def test_a_family_builds_at_its_published_size(name: str, tmp_path: Path) -> None:
    published.write_small_files(name, tmp_path)
    count = sum(prod(shape) for shape in published.shapes(tmp_path).values())
    assert count == PARAMETERS[name]
    settings = ModelSettings(id=str(tmp_path))
    family = family_for(Checkpoint.open(settings), settings)
    assert family.sizes.num_params == pytest.approx(count, rel=0.002)
    assert family.eos_token_ids


@pytest.mark.parametrize("name", published.names())
def test_a_family_sees_at_its_published_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's real geometry (384 pixels in patches of 14), on tensors that are shapes alone."""
    monkeypatch.setattr(views, "_resize", _resize_shape)
    published.write_small_files(name, tmp_path)
    model, _ = published.build(tmp_path)
    for width, height in ((1024, 768), (640, 480), (300, 1200)):
        layout = model.family.layout(width, height)
        image = torch.empty(height, width, 3, dtype=torch.uint8, device="meta")
        features = model.encode_images([image], [layout])
        assert features.shape[1] == model.feature_size
        if layout.num_states:  # with the places of tiles that the image does not fill
            assert len(features) >= layout.num_states
        else:
            assert len(features) == layout.num_tokens


def _resize_shape(image: torch.Tensor, size: tuple[int, int], filter: str) -> torch.Tensor:
    return image.new_empty(*size, 3)


EXAMPLES = {
    "gemma3": "gemma-3-4b", "mllama": "llama-3.2-11b-vision", "janus": "janus-pro-7b",
    "deepseek-vl2": "deepseek-vl2", "kimi-vl": "kimi-vl-a3b", "minicpm-v": "minicpm-v-2.6",
    "minicpm-o": "minicpm-o-2.6", "smolvlm": "smolvlm2-2.2b", "pixtral": "pixtral-12b",
    "llava": "llava-v1.5-13b", "llava-next": "llava-next-72b",
    "llava-onevision": "llava-onevision-qwen2-7b",
}  # fmt: skip


@pytest.mark.parametrize("entry", FAMILIES[:-1], ids=lambda e: e.name)
def test_the_table_of_models_tells_what_they_need(entry: Entry, tmp_path: Path) -> None:
    """As `run` counts before it loads, and `plan` before it is started."""
    sizes, num_states = _of_example(entry.name, tmp_path)
    assert entry.memory is not None
    told = astuple(entry.memory)
    weights = [sizes.num_bytes(2, float8) / 1e9 for float8 in (False, True)]
    needed = [least_card_gb(sizes, num_states, float8) for float8 in (False, True)]
    assert told == pytest.approx((*weights, *needed), abs=0.06, rel=0.002)


def _of_example(name: str, folder: Path) -> tuple[ModelSizes, int]:
    """Sizes, and the states of one image."""
    if name == "qwen-vl":
        return qwen_sizes(BIG, BIG_VISION, "qwen2_5", False), 0
    published.write_small_files(EXAMPLES[name], folder)
    settings = ModelSettings(id=str(folder))
    family = family_for(Checkpoint.open(settings), settings)
    return family.sizes, family.layout(1024, 768).num_states


def test_work_follows_from_sizes(tmp_path: Path) -> None:
    """Of a mixture, the experts that a token meets; twice the parameters a token."""
    published.write_small_files("kimi-vl-a3b", tmp_path)
    settings = ModelSettings(id=str(tmp_path))
    sizes = family_for(Checkpoint.open(settings), settings).sizes
    one = work_of_sizes(sizes, [1036], [(1100, 0, 1)])
    assert one.prefill - one.prefill_attention == 2.0 * 1100 * sizes.active_params + (
        sizes.embedding_params
    )
    assert one.decode == one.decode_bytes == 0
    assert 0.5 < one.vision / one.prefill < 2
    assert work_of_sizes(sizes, [], [(1100, 0, 2)]).decode_bytes == 2 * 15552 * 1101


def test_random_weights_load(small: Path) -> None:
    folder = published.make("small", small)
    assert published.make("small", folder) == folder
    model = open_ours(folder, spec.build)
    assert model.family.image_token_id == IDS["<image>"]
