"""Eight-bit floating point matrix products with one scale a row on both sides.

`quantize_rows` scales each row so that its largest value becomes the largest of float8 e4m3;
`scaled_product` multiplies two such matrices. Each row's result depends on that row alone. Knows no
layer. Source: Micikevicius et al., "FP8 formats for deep learning" (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import invariant, next_power_of_2, tl, triton, use_triton
from pipeline.kernels.matmul import invariant_matmul

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1e-12
STEP = 128  # columns of K that a product in pieces takes at a time


class Quantized(NamedTuple):
    """float8 `values` [N, K] and float32 `scale` [N, P]: each piece of a row has its scale.

    Values times scales are what was quantised. A piece is `piece_width(K, P)` wide, the last may be
    narrower.
    """

    values: Tensor
    scale: Tensor


def piece_width(depth: int, pieces: int) -> int:
    """Columns of each piece of a row: whole steps of a product, where there are several."""
    return depth if pieces == 1 else -(-depth // (STEP * pieces)) * STEP


def quantize_rows(x: Tensor, pieces: int = 1) -> Quantized:
    """Quantise each of the `pieces` of each row of `x` [N, K]."""
    if use_triton(x):
        return _quantize_rows_triton(x, pieces)
    return quantize_rows_reference(x, pieces)


def quantize_rows_reference(x: Tensor, pieces: int = 1) -> Quantized:
    depth = x.shape[-1]
    width = piece_width(depth, pieces)
    wide = functional.pad(x.float(), (0, width * pieces - depth)).unflatten(-1, (pieces, width))
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    values = (wide / scale).to(FP8).flatten(-2)[..., :depth].contiguous()
    return Quantized(values, scale.squeeze(-1))


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, width, piece, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * piece
    column = start + tl.arange(0, BLOCK)
    inside = column < tl.minimum(start + piece, width)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, SMALLEST)
    tl.store(scale_ptr + row * tl.num_programs(1) + tl.program_id(1), scale)
    tl.store(out_ptr + row * width + column, (x * (1.0 / scale)).to(tl.float8e4nv), mask=inside)


def _quantize_rows_triton(x: Tensor, pieces: int) -> Quantized:
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(rows, pieces, dtype=torch.float32, device=x.device)
    piece = piece_width(width, pieces)
    block = next_power_of_2(piece)
    if rows:
        _quantize_rows_kernel[(rows, pieces)](
            x, out, scale, x.stride(0), width, piece, LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
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
