"""RMS normalisation of query and key heads where they stand, in one pass.

Rounds as transformers does: where the weight has the heads' type the normalised value is rounded to
it before the weight multiplies; a wider weight (Gemma's 1 + w) multiplies first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton

HEADS_AT_ONCE = 16


def norm_heads(heads: Tensor, weight: Tensor, eps: float) -> None:
    """Normalise each head of `heads` [T, H, D] in place, by its own row of `weight` [H, D].

    Tokens may lie apart; a token's heads lie beside each other.
    """
    if use_triton(heads):
        _norm_heads_triton(heads, weight, eps)
    else:
        heads.copy_(norm_heads_reference(heads, weight, eps))


def norm_heads_reference(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = heads.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype == heads.dtype:
        return weight * wide.to(heads.dtype)
    return (weight * wide).to(heads.dtype)


@triton.jit
def _norm_heads_kernel(
    x_ptr, weight_ptr, stride, eps,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (column < DIM)
    place = x_ptr + tl.program_id(0).to(tl.int64) * stride + head * DIM + column
    wide = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / DIM + eps)
    normed = wide * scale[:, None]
    weight = tl.load(weight_ptr + head * DIM + column, mask=inside, other=0.0)
    if weight_ptr.dtype.element_ty == x_ptr.dtype.element_ty:
        normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    normed = normed * weight.to(tl.float32)
    tl.store(place, normed.to(x_ptr.dtype.element_ty), mask=inside)


def _norm_heads_triton(heads: Tensor, weight: Tensor, eps: float) -> None:
    count, num_heads, dim = heads.shape
    assert heads.stride(2) == 1
    assert heads.stride(1) == dim
    if count:
        _norm_heads_kernel[(count, triton.cdiv(num_heads, HEADS_AT_ONCE))](
            heads, weight.contiguous(), heads.stride(0), eps, NUM_HEADS=num_heads, DIM=dim,
            ROWS=HEADS_AT_ONCE, BLOCK=next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
