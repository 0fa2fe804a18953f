"""Self-attention inside short windows of packed tokens, rotary embedding included: one pass over
queries, keys and values as their projection leaves them.

A program takes one window and a few heads; a window is one tile, so its scores never leave the
chip. Halves of a head are kept apart, as rotation pairs them, so widths like 80 need no copy.
Knows no image and no window order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan, plan_attention, varlen_attention
from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.rope import rotate
from pipeline.kernels.transfer import to_device

LONGEST = 64  # tokens of a window that the kernel takes


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Windows that follow each other: int32 [W, 2] of start and length, or dense rectangles."""

    table: Tensor | None
    dense: AttentionPlan | None


def plan_windows(lengths: Sequence[int], like: Tensor) -> WindowPlan:
    """Plan for packed windows of `lengths` tokens on the device of `like`; once a batch shape."""
    if not use_triton(like) or max(lengths, default=0) > LONGEST:
        return WindowPlan(None, plan_attention(lengths, like.device))
    length = torch.tensor(lengths, dtype=torch.int32)
    table = torch.stack([length.cumsum(0).int() - length, length], 1).contiguous()
    return WindowPlan(to_device(table, like.device), None)


def window_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, plan: WindowPlan, num_heads: int, scale: float
) -> Tensor:
    """`qkv` [T, 3 H D], angles float32 [T, D/2] -> [T, H D]; tokens see their own window."""
    if plan.table is not None:
        return _window_triton(qkv, cos, sin, plan.table, num_heads, scale)
    return window_attention_reference(qkv, cos, sin, plan, num_heads, scale)


def window_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, plan: WindowPlan, num_heads: int, scale: float
) -> Tensor:
    assert plan.dense is not None
    heads = qkv.view(len(qkv), 3 * num_heads, -1)
    q, k = rotate(heads[:, : 2 * num_heads], cos, sin).split(num_heads, dim=1)
    return varlen_attention(q, k, heads[:, 2 * num_heads :], plan.dense, scale).flatten(1)


@triton.jit
def _turned(base, cos, sin, mask, HALF: tl.constexpr, kind: tl.constexpr):
    first = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(base + HALF, mask=mask, other=0.0).to(tl.float32)
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@triton.jit
def _window_kernel(
    qkv_ptr, cos_ptr, sin_ptr, table_ptr, out_ptr, factor,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0)
    start = tl.load(table_ptr + window * 2).to(tl.int64)
    length = tl.load(table_ptr + window * 2 + 1)
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, BLOCK)
    kind = qkv_ptr.dtype.element_ty
    mask = (token[:, None] < length) & (channel[None, :] < HALF)
    angle = (start + token[:, None]) * HALF + channel[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    WIDTH: tl.constexpr = NUM_HEADS * 2 * HALF
    row = (start + token[:, None]) * (3 * WIDTH) + channel[None, :]
    out_row = (start + token[:, None]) * WIDTH + channel[None, :]
    for number in range(HEADS):
        head = (tl.program_id(1) * HEADS + number) * 2 * HALF
        q1, q2 = _turned(qkv_ptr + row + head, cos, sin, mask, HALF, kind)
        k1, k2 = _turned(qkv_ptr + row + head + WIDTH, cos, sin, mask, HALF, kind)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores += tl.dot(q2, tl.trans(k2), input_precision="ieee")
        scores = tl.where(token[None, :] < length, scores * factor, float("-inf"))
        weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
        norm = tl.sum(weight, 1)[:, None]
        weight = weight.to(kind)
        for half in tl.static_range(2):
            values = qkv_ptr + row + head + 2 * WIDTH + half * HALF
            part = tl.dot(weight, tl.load(values, mask=mask, other=0.0), input_precision="ieee")
            tl.store(out_ptr + out_row + head + half * HALF, (part / norm).to(kind), mask=mask)


def _window_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, table: Tensor, num_heads: int, scale: float
) -> Tensor:
    width = qkv.shape[1] // 3
    half = width // num_heads // 2
    out = torch.empty(len(qkv), width, dtype=qkv.dtype, device=qkv.device)
    heads = next(n for n in (4, 2, 1) if num_heads % n == 0)  # of one program
    if len(table):
        _window_kernel[(len(table), num_heads // heads)](
            qkv, cos, sin, table, out, scale * 1.4426950408889634,
            NUM_HEADS=num_heads, HALF=half, HEADS=heads, TOKENS=LONGEST,
            BLOCK=max(16, next_power_of_2(half)), num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
