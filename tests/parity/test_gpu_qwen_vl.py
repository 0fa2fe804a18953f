"""On a GPU the models compute what they compute on a CPU: kernels, window plans, merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import WRITERS
from tests.helpers.parity import difference, mixed_prompt, open_found, our_logits

pytestmark = pytest.mark.gpu
SIZES = [(301, 117), (224, 224), (61, 343), (224, 224)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["f32", "bf16"]
)
@torch.inference_mode()
def test_logits_equal_the_cpus(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path)
    cpu = open_found(folder)
    prompt = mixed_prompt(cpu.family, SIZES)
    found = our_logits(open_found(folder, "cuda", dtype), prompt)
    assert difference(found, our_logits(cpu, prompt)) < tolerance


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
