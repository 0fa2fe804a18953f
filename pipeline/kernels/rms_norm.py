"""RMS normalisation with the residual addition before it, in one pass over the row; for products
in float8 also the quantisation after it. A product in parts is added here too.

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
from pipeline.kernels.split_matmul import Parts, whole


def rms_norm(
    x: Tensor | Parts, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (normalised `x + residual`, `x + residual`), both shaped as `x` [..., H]."""
    if use_triton(weight):
        return _rms_norm_triton(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(
    x: Tensor | Parts, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = whole(x)
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype != x.dtype:
        return (normed * weight).to(x.dtype), total
    return normed.to(x.dtype) * weight, total


def rms_norm_fp8(
    x: Tensor | Parts, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Quantized, Tensor]:
    """`rms_norm` of `x` [N, H], the normalised rows quantised as `quantize_rows` does."""
    if use_triton(weight):
        return _rms_norm_fp8_triton(x, weight, eps, residual)
    normed, total = rms_norm_reference(x, weight, eps, residual)
    return quantize_rows_reference(normed), total


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, x_stride, width, eps,
    PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    kind: tl.constexpr = sum_ptr.dtype.element_ty
    part = x_ptr + row * x_stride + column
    x = tl.load(part, mask=inside, other=0.0)
    if PARTS > 1:
        for _ in tl.static_range(PARTS - 1):
            part += tl.num_programs(0).to(tl.int64) * width
            x += tl.load(part, mask=inside, other=0.0)
        x = x.to(kind)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * width + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(kind)
    if HAS_RESIDUAL or PARTS > 1:
        tl.store(sum_ptr + row * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = wide * scale
    if weight_ptr.dtype.element_ty == kind:
        normed = normed.to(kind).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(kind)
    if QUANTIZE:
        wide = y.to(tl.float32)
        unit = tl.maximum(tl.max(tl.abs(wide), 0) / LARGEST, SMALLEST)
        tl.store(scale_ptr + row, unit)
        tl.store(y_ptr + row * width + column, (wide * (1.0 / unit)).to(tl.float8e4nv), mask=inside)
    else:
        tl.store(y_ptr + row * width + column, y, mask=inside)


def _rms_norm_triton(
    x: Tensor | Parts, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = x.values.shape[1:] if isinstance(x, Parts) else x.shape
    y = torch.empty(shape, dtype=x.dtype, device=weight.device)
    return y, _launch(x, weight, eps, residual, y, None)


def _rms_norm_fp8_triton(
    x: Tensor | Parts, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Quantized, Tensor]:
    shape = x.values.shape[1:] if isinstance(x, Parts) else x.shape
    values = torch.empty(shape, dtype=FP8, device=weight.device)
    scale = torch.empty(len(values), 1, dtype=torch.float32, device=weight.device)
    return Quantized(values, scale), _launch(x, weight, eps, residual, values, scale)


def _launch(
    x: Tensor | Parts,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    y: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Fill `y`, and `scale` where rows are quantised; return what was normalised."""
    width, parts = y.shape[-1], 1
    if isinstance(x, Parts):
        rows, parts = x.values[0], len(x.values)
    else:
        rows = x.reshape(-1, width)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
    total = rows
    if residual is not None or parts > 1:
        total = torch.empty(rows.shape, dtype=x.dtype, device=y.device)
    block = next_power_of_2(width)
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows, residual.contiguous() if residual is not None else rows, weight, y, total,
            y if scale is None else scale, rows.stride(0), width, eps,
            PARTS=parts, HAS_RESIDUAL=residual is not None, QUANTIZE=scale is not None,
            BLOCK=block, LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
            num_warps=(16 if parts > 1 else 8) if block > 2048 else 4,
        )  # fmt: skip
    return total.view(y.shape)
