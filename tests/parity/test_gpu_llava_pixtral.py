"""On a GPU LLaVA and Pixtral compute what they compute on a CPU, without waiting for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.kernels.backend import set_invariant
from pipeline.models.families.llava import tiles
from pipeline.models.vision.views import render_view
from pipeline.rows import View
from tests.helpers.llava_checkpoint import write_original
from tests.helpers.parity import (
    check_encodes_without_waiting,
    difference,
    images_on,
    mixed_prompt,
    open_found,
    our_logits,
    random_image,
)
from tests.helpers.pixtral_checkpoint import write_mistral, write_twin

pytestmark = pytest.mark.gpu
KINDS = ("1.5", "1.6", "onevision", "pixtral", "pixtral-twin")
SIZES = [(70, 31), (17, 43), (9, 7), (160, 120), (70, 31)]


def _write(folder: Path, kind: str) -> Path:
    if kind.startswith("pixtral"):
        return (write_mistral if kind == "pixtral" else write_twin)(folder)
    return write_original(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=["f32", "bf16"]
)
@torch.inference_mode()
def test_logits_equal_the_cpus(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = _write(tmp_path / kind, kind)
    cpu = open_found(folder)
    prompt = mixed_prompt(cpu.family, SIZES)
    found = our_logits(open_found(folder, "cuda", dtype), prompt)
    assert difference(found, our_logits(cpu, prompt)) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_images_are_encoded_without_waiting(kind: str, tmp_path: Path) -> None:
    model = open_found(_write(tmp_path / kind, kind), "cuda", torch.bfloat16)
    check_encodes_without_waiting(model, mixed_prompt(model.family, SIZES))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_images_bits_do_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    """Under `engine.deterministic`; the decoder's are the engine's tests'."""
    model = open_found(_write(tmp_path / kind, kind), "cuda", torch.bfloat16)
    prompt = mixed_prompt(model.family, SIZES)
    images, layouts = images_on(model, prompt), list(prompt.layouts)
    set_invariant(True)
    try:
        together = model.encode_images(images, layouts)
        alone = [model.encode_images([i], [x]) for i, x in zip(images, layouts, strict=True)]
    finally:
        set_invariant(False)
    assert torch.equal(together, torch.cat(alone))


VIEWS: list[View] = [
    *tiles.tile_views(70, 301, (48, 96), 24),
    tiles.padded_view(70, 301, 24, (122, 116, 104)),
    tiles.padded_view(301, 70, 24, (127, 127, 127)),
    tiles.cropped_view(70, 301, 24),
]


@pytest.mark.parametrize("view", VIEWS)
def test_views_equal_pillows(view: View) -> None:
    tall = view.box is not None and view.box[0] < 0
    image = torch.from_numpy(random_image(70, 301) if tall else random_image(301, 70))
    found: Any = render_view(image.cuda(), view).cpu().numpy()
    assert np.array_equal(found, render_view(image, view).numpy())
