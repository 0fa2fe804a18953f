"""On a GPU LLaVA and Pixtral compute what they compute on a CPU, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.kernels.backend import set_invariant
from pipeline.models.base import DenseAttend, Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava import tiles
from pipeline.models.loading import load_model
from pipeline.models.registry import family_for
from pipeline.models.vision.views import render_view
from pipeline.rows import View
from pipeline.settings import ModelSettings
from tests.helpers.llava_checkpoint import write_original
from tests.helpers.parity import Prompt, difference, make_prompt, random_image, random_text
from tests.helpers.pixtral_checkpoint import write_mistral, write_twin

pytestmark = pytest.mark.gpu
KINDS = ("1.5", "1.6", "onevision", "pixtral", "pixtral-twin")
SIZES = [(70, 31), (17, 43), (9, 7), (160, 120), (70, 31)]


def _write(folder: Path, kind: str) -> Path:
    if kind.startswith("pixtral"):
        return (write_mistral if kind == "pixtral" else write_twin)(folder)
    return write_original(folder, kind)


def _load(folder: Path, device: str, dtype: torch.dtype) -> Model:
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    return load_model(checkpoint, family_for(checkpoint, settings), device, dtype)


def _logits(model: Model, prompt: Prompt) -> torch.Tensor:
    positions, _ = model.family.positions(prompt.tokens, prompt.placed())
    images = [torch.from_numpy(image).to(model.device) for image in prompt.images]
    features = model.encode_images(images, list(prompt.layouts))
    tokens = torch.from_numpy(prompt.tokens).long().to(model.device)
    x = model.embed(tokens, features, torch.from_numpy(prompt.where).to(model.device))
    decoder = model.decoder
    placed = torch.from_numpy(positions).to(model.device)
    return decoder.logits(decoder(x, placed, DenseAttend(decoder.config))).cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)], ids=["f32", "bf16"]
)
@torch.inference_mode()
def test_logits_equal_the_cpus(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = _write(tmp_path / kind, kind)
    cpu = _load(folder, "cpu", torch.float32)
    parts = [p for i, s in enumerate(SIZES) for p in (random_text(4, i), random_image(*s, i))]
    prompt = make_prompt(cpu.family, [*parts, random_text(5)])
    found = _logits(_load(folder, "cuda", dtype), prompt)
    assert difference(found, _logits(cpu, prompt)) < tolerance


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_an_error")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_images_are_encoded_without_waiting(kind: str, tmp_path: Path) -> None:
    model = _load(_write(tmp_path / kind, kind), "cuda", torch.bfloat16)
    images = [torch.from_numpy(random_image(*size)).cuda() for size in SIZES]
    layouts = [model.family.layout(*size) for size in SIZES]
    first = model.encode_images(images, layouts)
    torch.cuda.set_sync_debug_mode("error")
    again = model.encode_images(images, layouts)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_images_bits_do_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    """Under `engine.deterministic`; the decoder's are the engine's tests'."""
    model = _load(_write(tmp_path / kind, kind), "cuda", torch.bfloat16)
    images = [torch.from_numpy(random_image(*size)).cuda() for size in SIZES]
    layouts = [model.family.layout(*size) for size in SIZES]
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
