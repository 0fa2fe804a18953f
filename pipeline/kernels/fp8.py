"""Eight-bit floating point matrix products with one scale a row on both sides.

`quantize_rows` scales each row so that its largest value becomes the largest of float8 e4m3;
`scaled_product` multiplies two such matrices. Each row's result depends on that row alone. Knows no
layer. Source: Micikevicius et al., "FP8 formats for deep learning" (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.backend import invariant, next_power_of_2, tl, triton, use_triton
from pipeline.kernels.matmul import invariant_matmul

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1e-12


class Quantized(NamedTuple):
    """float8 `values` [N, K] and float32 `scale` [N, 1]; their product is what was quantised."""

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor) -> Quantized:
    """Quantise each row of `x` [N, K]."""
    if use_triton(x):
        return _quantize_rows_triton(x)
    return quantize_rows_reference(x)


def quantize_rows_reference(x: Tensor) -> Quantized:
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return Quantized((wide / scale).to(FP8), scale)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, width, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, SMALLEST)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + column, (x / scale).to(tl.float8e4nv), mask=inside)


def _quantize_rows_triton(x: Tensor) -> Quantized:
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    if rows:
        _quantize_rows_kernel[(rows,)](
            x, out, scale, x.stride(0), width, LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
            BLOCK=block, num_warps=8 if block > 4096 else 4,
        )  # fmt: skip
    return Quantized(out, scale)


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`a` [N, K] and `b` [M, K] with their scales [N, 1], [M, 1] -> `a @ b.T + bias` [N, M]."""
    if invariant():
        return invariant_matmul(a, b, bias, dtype, a_scale, b_scale)
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    product = (a.float() @ b.float().T) * a_scale * b_scale.T
    return (product if bias is None else product + bias.float()).to(dtype)
