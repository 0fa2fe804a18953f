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
from pipeline.kernels.fp8 import quantize_rows, scaled_product
from pipeline.kernels.swiglu import swiglu_reference

LONGEST_CHUNK = 4096  # choices that the sorting program reads at once


@dataclass(slots=True)
class ExpertWeights:
    """`gate_up` [E, 2 I, H] with the gate first, `down` [E, H, I]; in float8 with a scale a row."""

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None  # float32 [E, 2 I]
    down_scale: Tensor | None = None  # float32 [E, H]

    def quantized(self) -> ExpertWeights:
        values, scales = [], []
        for weight in (self.gate_up, self.down):
            value, scale = quantize_rows(weight.flatten(0, 1))
            values.append(value.view(weight.shape))
            scales.append(scale.view(weight.shape[:2]))
        return ExpertWeights(*values, *scales)


def routed_experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: ExpertWeights) -> Tensor:
    """`x` [T, H] through experts `chosen` [T, K], summed by `weights` float32 [T, K] -> [T, H]."""
    if use_triton(x):
        return _routed_triton(x, chosen, weights, experts)
    return routed_experts_reference(x, chosen, weights, experts)


def routed_experts_reference(
    x: Tensor, chosen: Tensor, weights: Tensor, experts: ExpertWeights
) -> Tensor:
    top = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(experts.down)).tolist()
    out = x.new_empty(len(flat), x.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = order[start : start + count]
            gate_up, down = experts.gate_up[expert], experts.down[expert]
            s_up, s_down = (
                None if s is None else s[expert]
                for s in (experts.gate_up_scale, experts.down_scale)
            )
            inner = swiglu_reference(_product(x[pairs // top], gate_up, s_up))
            out[pairs] = _product(inner, down, s_down)
            start += count
    return (out.view(len(x), top, -1).float() * weights[..., None]).sum(1).to(x.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return functional.linear(x, weight)
    values, by = quantize_rows(x)
    return scaled_product(values, by, weight, scale[:, None], None, x.dtype)


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
    chunk = min(LONGEST_CHUNK, max(64, next_power_of_2(pairs)))
    _sort_kernel[(num_experts,)](
        flat, order, blocks, pairs, size, BINS=next_power_of_2(num_experts + 1), CHUNK=chunk,
        num_warps=8 if chunk > 1024 else 4,
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
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, order_ptr, blocks_ptr, inner, hidden,
    TOP: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    w_first = expert.to(tl.int64) * 2 * inner + column
    gate_row = weight_ptr + w_first[:, None] * hidden
    up_row = weight_ptr + (w_first + inner)[:, None] * hidden
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
    if SCALED:
        by = tl.load(x_scale_ptr + token, mask=valid, other=0.0)[:, None]
        gate *= by * tl.load(scale_ptr + w_first, mask=column < inner, other=0.0)[None, :]
        up *= by * tl.load(scale_ptr + w_first + inner, mask=column < inner, other=0.0)[None, :]
    # NOTE: rounded between the steps, as separate products would be.
    kind = out_ptr.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(out, (silu * up).to(kind), mask=valid[:, None] & (column < inner)[None, :])


@triton.jit
def _down_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, by_ptr, out_ptr, order_ptr, blocks_ptr, hidden,
    inner, SCALED: tl.constexpr,
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
    w_first = expert.to(tl.int64) * hidden + column
    w_row = weight_ptr + w_first[:, None] * inner
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, inner, BLOCK_K):
        at = (begin + depth)[None, :]
        x = tl.load(x_row + at, mask=valid[:, None] & (at < inner), other=0.0)
        w = tl.load(w_row + at, mask=(column < hidden)[:, None] & (at < inner), other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    pair = tl.load(order_ptr + row, mask=valid, other=0).to(tl.int64)
    by = tl.load(by_ptr + pair, mask=valid, other=0.0)
    if SCALED:
        by *= tl.load(x_scale_ptr + row, mask=valid, other=0.0)
        acc *= tl.load(scale_ptr + w_first, mask=column < hidden, other=0.0)[None, :]
    out = out_ptr + pair[:, None] * hidden + column[None, :]
    mask = valid[:, None] & (column < hidden)[None, :]
    tl.store(out, (acc * by[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block: about the pairs of one expert, as the matrix units like them."""
    return min(128, max(16, next_power_of_2(pairs // num_experts)))


def _routed_triton(x: Tensor, chosen: Tensor, weights: Tensor, experts: ExpertWeights) -> Tensor:
    tokens, hidden = x.shape
    top, (count, _, inner) = chosen.shape[1], experts.down.shape
    if tokens == 0:
        return torch.empty_like(x)
    size = block_rows(tokens * top, count)
    sorting = expert_blocks(chosen, count, size)
    table = (sorting.order, sorting.blocks)
    middle = x.new_empty(tokens * top, inner)
    out = x.new_empty(tokens, top, hidden)
    scaled = experts.down_scale is not None
    tiles: dict[str, int | bool] = {
        "SCALED": scaled, "BLOCK_M": size, "BLOCK_K": 128 if scaled else 64,
        "num_warps": 4 if size <= 64 else 8, "num_stages": 3,
    }  # fmt: skip
    narrow, wide = 64, 128
    rows, by = quantize_rows(x) if scaled else (x.contiguous(), None)
    _gate_up_kernel[(triton.cdiv(inner, narrow), len(sorting.blocks))](
        rows, by, experts.gate_up, experts.gate_up_scale, middle, *table, inner, hidden, TOP=top,
        BLOCK_N=narrow, **tiles,
    )  # fmt: skip
    rows, by = quantize_rows(middle) if scaled else (middle, None)
    _down_kernel[(triton.cdiv(hidden, wide), len(sorting.blocks))](
        rows, by, experts.down, experts.down_scale, weights.contiguous(), out, *table, hidden,
        inner, BLOCK_N=wide, **tiles,
    )  # fmt: skip
    return out.sum(1)
