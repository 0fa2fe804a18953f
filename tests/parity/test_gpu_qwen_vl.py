"""On a GPU the models compute what they compute on a CPU: kernels, window plans, merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.models.base import DenseAttend, Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.qwen_vl import spec
from pipeline.models.loading import load_model
from pipeline.settings import ModelSettings
from tests.helpers.checkpoints import WRITERS
from tests.helpers.parity import Prompt, difference, make_prompt, random_image, random_text

pytestmark = pytest.mark.gpu
SIZES = [(301, 117), (224, 224), (61, 343), (224, 224)]


def _load(folder: Path, device: str, dtype: torch.dtype) -> Model:
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    return load_model(checkpoint, spec.build(checkpoint, settings), device, dtype)


def _logits(model: Model, prompt: Prompt) -> torch.Tensor:
    positions, _ = model.family.positions(prompt.tokens, prompt.placed())
    images = [torch.from_numpy(image).to(model.device) for image in prompt.images]
    features = model.encode_images(images, list(prompt.layouts))
    tokens = torch.from_numpy(prompt.tokens).long().to(model.device)
    x = model.embed(tokens, features, torch.from_numpy(prompt.where).to(model.device))
    decoder = model.decoder
    placed = torch.from_numpy(positions).to(model.device)
    return decoder.logits(decoder(x, placed, DenseAttend(decoder.config))).cpu()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["f32", "bf16"]
)
@torch.inference_mode()
def test_logits_equal_the_cpus(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path)
    cpu = _load(folder, "cpu", torch.float32)
    parts = [p for i, s in enumerate(SIZES) for p in (random_text(4, i), random_image(*s, i))]
    prompt = make_prompt(cpu.family, [*parts, random_text(5)])
    assert (
        difference(_logits(_load(folder, "cuda", dtype), prompt), _logits(cpu, prompt)) < tolerance
    )


@torch.inference_mode()
def test_kernels_equal_their_references() -> None:
    from pipeline.kernels.quick_gelu import quick_gelu, quick_gelu_reference
    from pipeline.kernels.rope import rotate, rotate_reference

    heads = torch.randn(513, 48, 80, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.rand(2, 513, 40, device="cuda")
    part = heads[:, :32]
    assert (
        difference(rotate(part, cos, sin).float(), rotate_reference(part, cos, sin).float()) < 4e-3
    )
    x = torch.randn(77, 5120, device="cuda", dtype=torch.bfloat16)
    assert difference(quick_gelu(x).float(), quick_gelu_reference(x).float()) < 4e-3
