"""Eight-bit weights: near the unquantised model, and no row depends on its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.kernels.fp8 import FP8, quantize_rows, scaled_product
from pipeline.models.base import DenseAttend, Model
from pipeline.models.families.qwen_vl import spec
from pipeline.models.fp8 import Fp8Linear
from pipeline.models.layers import Linear
from tests.helpers.checkpoints import write_qwen2_vl
from tests.helpers.parity import difference, open_ours, random_text


def test_rows_come_back_within_the_formats_precision() -> None:
    x = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype == FP8
    assert (values.float() * scale - x).abs().max(1).values.div(x.abs().amax(1)).max() < 0.04


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = quantize_rows(torch.zeros(2, 16))
    assert not (values.float() * scale).any()


def test_product_has_scales_and_bias() -> None:
    a, b, bias = torch.randn(3, 32), torch.randn(16, 32), torch.randn(16)
    out = scaled_product(*quantize_rows(a), *quantize_rows(b), bias, torch.float32)
    assert difference(out, a @ b.T + bias) < 0.03


def test_rows_are_independent() -> None:
    linear = Fp8Linear(Linear(torch.randn(32, 64)))
    x = torch.randn(9, 64)
    torch.testing.assert_close(linear(x)[4:5], linear(x[4:5]))


@torch.inference_mode()
def test_a_quantized_decoder_is_near_the_other(tmp_path: Path) -> None:
    folder = write_qwen2_vl(tmp_path)
    plain, quantized = (open_ours(folder, spec.build, quantization=q) for q in ("none", "fp8"))
    tokens = torch.tensor(random_text(40))
    positions = torch.arange(40).expand(3, -1)

    def logits(model: Model) -> torch.Tensor:
        decoder = model.decoder
        hidden = decoder(model.embed(tokens), positions, DenseAttend(decoder.config))
        return decoder.logits(hidden)

    assert all(layer.mlp.down.weight.dtype == FP8 for layer in quantized.decoder.layers)
    before, after = logits(plain), logits(quantized)
    assert 1e-4 < difference(after, before) < 0.15
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.9


@pytest.mark.gpu
def test_kernel_equals_reference() -> None:
    from pipeline.kernels.fp8 import quantize_rows_reference

    x = torch.randn(33, 3584, device="cuda", dtype=torch.bfloat16)
    values, scale = quantize_rows(x)
    expected, expected_scale = quantize_rows_reference(x)
    torch.testing.assert_close(scale, expected_scale)
    assert (values.float() - expected.float()).abs().max() <= 32
    assert (values.float() != expected.float()).float().mean() < 1e-3
    b = torch.randn(64, 3584, device="cuda", dtype=torch.bfloat16)
    out = scaled_product(values, scale, *quantize_rows(b), None, torch.bfloat16)
    assert difference(out.float(), x.float() @ b.float().T) < 0.03
