"""On a GPU MiniCPM and SmolVLM2 compute what they compute on a CPU, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.models.base import Model
from pipeline.models.vision.views import render_view
from pipeline.rows import ImageLayout, View
from tests.helpers.minicpm_checkpoint import write_minicpm_o, write_minicpm_v
from tests.helpers.parity import (
    Prompt,
    check_encodes_without_waiting,
    difference,
    open_found,
    our_logits,
    random_image,
    random_text,
)
from tests.helpers.smolvlm_checkpoint import write_smolvlm
from tests.parity.minicpm_cases import Wave, samples_of

pytestmark = pytest.mark.gpu
WRITERS: dict[str, Callable[[Path], Path]] = {
    "minicpm-v": write_minicpm_v,
    "minicpm-o": write_minicpm_o,
    "smolvlm": write_smolvlm,
}
SIZES = [(300, 200), (640, 480), (9, 7), (1600, 300), (640, 480)]
SOUNDS = [9_000, 500_000]


def _media(model: Model) -> tuple[list[np.ndarray], list[ImageLayout]]:
    """Images, and for a model that hears recordings among them."""
    media = [random_image(*size, seed) for seed, size in enumerate(SIZES)]
    layouts = [model.family.layout(*size) for size in SIZES]
    if "audio" in model.family.takes:
        for place, count in enumerate(SOUNDS):
            samples = samples_of(Wave(count, place))
            media.insert(2 * place, samples.view(np.uint8).reshape(-1, 4))
            layouts.insert(2 * place, model.family.audio_layout(count))
    return media, layouts


def _prompt(model: Model) -> Prompt:
    tokens: list[int] = []
    starts = []
    media, layouts = _media(model)
    for number, layout in enumerate(layouts):
        tokens += random_text(4, number)
        starts.append(len(tokens))
        tokens += model.family.image_tokens(layout).tolist()
    tokens += random_text(5)
    return Prompt(np.array(tokens, np.int32), tuple(media), tuple(layouts), tuple(starts))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.06)], ids=["f32", "bf16"]
)
@torch.inference_mode()
def test_logits_equal_the_cpus(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path / kind)
    cpu = open_found(folder)
    prompt = _prompt(cpu)
    found = our_logits(open_found(folder, "cuda", dtype), prompt)
    assert difference(found, our_logits(cpu, prompt)) < tolerance


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_media_are_encoded_without_waiting(kind: str, tmp_path: Path) -> None:
    model = open_found(WRITERS[kind](tmp_path / kind), "cuda", torch.bfloat16)
    check_encodes_without_waiting(model, _prompt(model))


@pytest.mark.parametrize("size", [(37, 500), (500, 37), (301, 300)])
@pytest.mark.parametrize("kind", ["bicubic", "lanczos"])
def test_views_equal_pillows(size: tuple[int, int], kind: str) -> None:
    image = torch.from_numpy(random_image(*size))
    for height, width in [(224, 224), (14, 980), (518, 392)]:
        view = View(height, width, resized=(height, width), filter=kind)
        found = render_view(image.cuda(), view).cpu().numpy()
        assert np.array_equal(found, render_view(image, view).numpy())
