"""The routed experts of a mixture: each token through its K chosen experts, summed by weight.

On a GPU the pairs (token, expert) are sorted by expert without asking the host: the grid has the
most blocks that any choice can need, and a block without work ends at once, so a CUDA graph can
hold a call. A token's result does not depend on its neighbours. Source of the block table: Gale et
al., "MegaBlocks" (2023), section 5. Knows no router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.swiglu import swiglu_reference

CHUNK = 1024  # choices that the sorting program reads at once


def routed_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`x` [T, H] through experts `chosen` [T, K], summed by `weights` float32 [T, K] -> [T, H].

    `gate_up` is [E, 2 I, H] with the gate first, `down` [E, H, I].
    """
    if use_triton(x):
        return _routed_triton(x, chosen, weights, gate_up, down)
    return routed_experts_reference(x, chosen, weights, gate_up, down)


def routed_experts_reference(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    top = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(down)).tolist()
    out = x.new_empty(len(flat), x.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = order[start : start + count]
            inner = swiglu_reference(functional.linear(x[pairs // top], gate_up[expert]))
            out[pairs] = functional.linear(inner, down[expert])
            start += count
    return (out.view(len(x), top, -1).float() * weights[..., None]).sum(1).to(x.dtype)


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Pairs sorted by expert, cut into blocks of `size` rows; all int32 on the device."""

    order: Tensor  # [T * K] sorted row -> pair, which is token * K + slot
    blocks: Tensor  # [G, 3] expert (-1: none), first sorted row, row after the last
    size: int


def expert_blocks(chosen: Tensor, num_experts: int, size: int) -> ExpertBlocks:
    """Sort `chosen` [T, K] by expert; as many blocks as any choice of T * K pairs can need."""
    flat = chosen.flatten().to(torch.int32)
    pairs = len(flat)
    most = pairs // size + min(num_experts, pairs)
    order = torch.empty(pairs, dtype=torch.int32, device=flat.device)
    blocks = torch.full((most, 3), -1, dtype=torch.int32, device=flat.device)
    _sort_kernel[(num_experts,)](
        flat, order, blocks, pairs, size, BINS=next_power_of_2(num_experts + 1), CHUNK=CHUNK,
        num_warps=4,
    )  # fmt: skip
    return ExpertBlocks(order, blocks, size)


@triton.jit
def _sort_kernel(
    chosen_ptr, order_ptr, blocks_ptr, pairs, size, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program an expert: where its pairs stand, which they are, and its blocks."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, pairs, CHUNK):
        chosen = tl.load(chosen_ptr + begin + lane, mask=begin + lane < pairs, other=BINS - 1)
        counts += tl.histogram(chosen, BINS)
    counts = tl.where(bins < BINS - 1, counts, 0)
    first = tl.sum(tl.where(bins < expert, counts, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    block = tl.sum(tl.where(bins < expert, (counts + size - 1) // size, 0), 0)
    for done in range(0, count, size):
        entry = blocks_ptr + (block + done // size) * 3
        tl.store(entry, expert)
        tl.store(entry + 1, first + done)
        tl.store(entry + 2, first + tl.minimum(done + size, count))
    place = first
    for begin in range(0, pairs, CHUNK):
        chosen = tl.load(chosen_ptr + begin + lane, mask=begin + lane < pairs, other=-1)
        mine = chosen == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order_ptr + place + rank - 1, begin + lane, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _gate_up_kernel(
    x_ptr, weight_ptr, out_ptr, order_ptr, blocks_ptr, inner, hidden,
    TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gathered tokens times gate and up, and their SwiGLU, in sorted order."""
    entry = blocks_ptr + tl.program_id(1) * 3
    expert = tl.load(entry)
    if expert < 0:
        return
    first, stop = tl.load(entry + 1), tl.load(entry + 2)
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < stop
    token = tl.load(order_ptr + row, mask=valid, other=0) // TOP
    depth = tl.arange(0, BLOCK_K)
    x_row = x_ptr + token.to(tl.int64)[:, None] * hidden
    gate_row = weight_ptr + (expert.to(tl.int64) * 2 * inner + column)[:, None] * hidden
    up_row = gate_row + inner.to(tl.int64) * hidden
    inside = (column < inner)[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, hidden, BLOCK_K):
        at = (begin + depth)[None, :]
        x = tl.load(x_row + at, mask=valid[:, None] & (at < hidden), other=0.0)
        w_gate = tl.load(gate_row + at, mask=inside & (at < hidden), other=0.0)
        w_up = tl.load(up_row + at, mask=inside & (at < hidden), other=0.0)
        gate = tl.dot(x, tl.trans(w_gate), gate, input_precision="ieee")
        up = tl.dot(x, tl.trans(w_up), up, input_precision="ieee")
    # NOTE: rounded between the steps, as separate products would be.
    kind = out_ptr.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(out, (silu * up).to(kind), mask=valid[:, None] & (column < inner)[None, :])


@triton.jit
def _down_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, order_ptr, blocks_ptr, hidden, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sorted rows times down, times the pair's weight, to the pair's own row."""
    entry = blocks_ptr + tl.program_id(1) * 3
    expert = tl.load(entry)
    if expert < 0:
        return
    first, stop = tl.load(entry + 1), tl.load(entry + 2)
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < stop
    depth = tl.arange(0, BLOCK_K)
    x_row = x_ptr + row.to(tl.int64)[:, None] * inner
    w_row = weight_ptr + (expert.to(tl.int64) * hidden + column)[:, None] * inner
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, inner, BLOCK_K):
        at = (begin + depth)[None, :]
        x = tl.load(x_row + at, mask=valid[:, None] & (at < inner), other=0.0)
        w = tl.load(w_row + at, mask=(column < hidden)[:, None] & (at < inner), other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    pair = tl.load(order_ptr + row, mask=valid, other=0).to(tl.int64)
    scale = tl.load(scale_ptr + pair, mask=valid, other=0.0)
    out = out_ptr + pair[:, None] * hidden + column[None, :]
    mask = valid[:, None] & (column < hidden)[None, :]
    tl.store(out, (acc * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block: about the pairs of one expert, as the matrix units like them."""
    return min(128, max(16, next_power_of_2(pairs // num_experts)))


def _routed_triton(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    tokens, hidden = x.shape
    top, (experts, _, inner) = chosen.shape[1], down.shape
    if tokens == 0:
        return torch.empty_like(x)
    size = block_rows(tokens * top, experts)
    sorting = expert_blocks(chosen, experts, size)
    middle = x.new_empty(tokens * top, inner)
    out = x.new_empty(tokens, top, hidden)
    narrow, wide = 64, 128
    warps = 4 if size <= 64 else 8
    _gate_up_kernel[(triton.cdiv(inner, narrow), len(sorting.blocks))](
        x.contiguous(), gate_up, middle, sorting.order, sorting.blocks, inner, hidden,
        TOP=top, BLOCK_M=size, BLOCK_N=narrow, BLOCK_K=64, num_warps=warps, num_stages=3,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, wide), len(sorting.blocks))](
        middle, down, weights.contiguous(), out, sorting.order, sorting.blocks, hidden, inner,
        BLOCK_M=size, BLOCK_N=wide, BLOCK_K=64, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out.sum(1)
