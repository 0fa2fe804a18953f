"""RMS normalisation with the residual addition before it, in one pass over the row; for products
in float8 also the quantisation after it.

Rounds as transformers' RMSNorm does: the sum in the input's type, the statistics in float32, the
normalised value back in the input's type before the weight multiplies it; a wider weight (Gemma's
1 + w) multiplies before that. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization"
(2019), equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.fp8 import FP8, LARGEST, SMALLEST_SCALE, Quantized, quantize_rows_reference


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (normalised `x + residual`, `x + residual`), both shaped as `x` [..., H]."""
    if use_triton(x):
        return _rms_norm_triton(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype != x.dtype:
        return (normed * weight).to(x.dtype), total
    return normed.to(x.dtype) * weight, total


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Quantized, Tensor]:
    """`rms_norm` of `x` [N, H], the normalised rows quantised as `quantize_rows` does."""
    if use_triton(x):
        return _rms_norm_fp8_triton(x, weight, eps, residual)
    normed, total = rms_norm_reference(x, weight, eps, residual)
    return quantize_rows_reference(normed), total


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, x_stride, width, eps,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * width + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = wide * scale
    if weight_ptr.dtype.element_ty == x_ptr.dtype.element_ty:
        normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(x_ptr.dtype.element_ty)
    if QUANTIZE:
        wide = y.to(tl.float32)
        unit = tl.maximum(tl.max(tl.abs(wide), 0) / LARGEST, SMALLEST)
        tl.store(scale_ptr + row, unit)
        tl.store(y_ptr + row * width + column, (wide / unit).to(tl.float8e4nv), mask=inside)
    else:
        tl.store(y_ptr + row * width + column, y, mask=inside)


def _rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _launch(x, weight, eps, residual, y, None)


def _rms_norm_fp8_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Quantized, Tensor]:
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return Quantized(values, scale), _launch(x, weight, eps, residual, values, scale)


def _launch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, y: Tensor, scale: Tensor | None
) -> Tensor:
    """Fill `y`, and `scale` where rows are quantised; return what was normalised."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    total = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if residual is not None else x
    block = next_power_of_2(width)
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows, residual.contiguous() if residual is not None else rows, weight, y, total,
            y if scale is None else scale, rows.stride(0), width, eps,
            HAS_RESIDUAL=residual is not None, QUANTIZE=scale is not None, BLOCK=block,
            LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return total.view(x.shape)
