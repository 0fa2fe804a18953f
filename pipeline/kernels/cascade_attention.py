"""Decode attention that reads keys which several lanes share once for all of them.

A job's prefix, or an image that several prompts ask about, lies in the cache once; here a program
takes a chunk of such a range for as many lanes as fill a tile, and what the lanes read alone goes
through the ordinary kernel. The parts are joined by their log sums. Source: Juravsky et al.,
"Hydragen" (2024), section 3. Knows no sequence: `engine/cascade.py` says which ranges are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, shared_memory, tl, triton
from pipeline.kernels.cached_rows import CachedRows, parts
from pipeline.kernels.decode_attention import BLOCK_KV, DecodePlan, join_splits, launch_decode
from pipeline.kernels.flash_parts import block_scores, fold_block, lowered, narrow
from pipeline.kernels.prefill_attention import WIDE_BYTES

ROWS = 64  # query heads of lanes in one tile
NUM_LEVELS = 2  # segments of a lane that may be shared: job prefix, group


@dataclass(frozen=True, slots=True)
class SharedReads:
    """`items` int32 [I, 3 + L]: level, start and length of a range, then the columns (lanes of the
    batch) that read it, -1 where there is none; an item of no length is idle. `taken` bool [B, S]:
    segments of a lane that items stand for.
    """

    items: Tensor
    taken: Tensor
    num_chunks: int  # that a range is cut into

    def without(self, plan: DecodePlan) -> DecodePlan:
        """What is left for each lane to read alone."""
        return DecodePlan(plan.segments * ~self.taken[:, :, None], plan.num_splits)


def lanes_per_item(num_heads: int, num_kv_heads: int) -> int:
    """How many lanes one item serves."""
    return max(1, ROWS // (num_heads // num_kv_heads))


def cascade_attention(
    q: Tensor,
    k: CachedRows,
    v: CachedRows,
    alone: DecodePlan,
    shared: SharedReads,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`decode_attention` of what lanes read `alone` and of what they share."""
    lanes, num_heads, dim = q.shape
    num_parts = alone.num_splits + NUM_LEVELS * shared.num_chunks
    part = q.new_empty(lanes, num_heads, num_parts, dim, dtype=torch.float32)
    stat = q.new_full((lanes, num_heads, num_parts), float("-inf"), dtype=torch.float32)
    q = q.contiguous()
    launch_decode(q, k, v, alone, scale, part, stat, num_parts, None, softcap)
    stages = 3
    if dim > 128:
        stages = 2 if shared_memory(q.device) >= WIDE_BYTES else 1
    (keys, k_scale), (values, v_scale) = parts(k), parts(v)
    _shared_kernel[(len(shared.items), len(keys), shared.num_chunks)](
        q, keys, values, k_scale, v_scale, shared.items, part, stat, keys.stride(0), scale,
        num_parts, alone.num_splits, HQ=num_heads, GROUP=num_heads // len(keys), DIM=dim,
        LANES=shared.items.shape[1] - 3, ROWS=ROWS, BLOCK_D=max(16, next_power_of_2(dim)),
        BLOCK=BLOCK_KV, SOFTCAP=softcap or 0.0, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return join_splits(part, stat, torch.empty_like(q))


@triton.jit
def _shared_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, items_ptr, part_ptr, stat_ptr, head_stride,
    scale, num_parts, first_part,
    HQ: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    item = items_ptr + tl.program_id(0) * (3 + LANES)
    kv_head = tl.program_id(1)
    chunk = tl.program_id(2)
    num_chunks = tl.num_programs(2)
    start = tl.load(item + 1).to(tl.int64)
    length = tl.load(item + 2)
    size = tl.cdiv(tl.cdiv(length, num_chunks), BLOCK) * BLOCK
    stop = tl.minimum((chunk + 1) * size, length)
    if chunk * size >= stop:
        return
    row = tl.arange(0, ROWS)
    number = row // GROUP
    column = tl.load(item + 3 + number, mask=number < LANES, other=-1)
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    is_row = column >= 0
    q_mask = is_row[:, None] & (channel[None, :] < DIM)
    q_row = (column * HQ + head).to(tl.int64)
    q = tl.load(q_ptr + q_row[:, None] * DIM + channel[None, :], mask=q_mask, other=0.0)
    if k_scale_ptr is not None:
        q = narrow(q)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    base = kv_head.to(tl.int64) * head_stride + start * DIM
    first = kv_head.to(tl.int64) * (head_stride // DIM) + start
    for begin in range(chunk * size, stop, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        known = key < stop
        mask = known[:, None] & (channel[None, :] < DIM)
        offset = base + key[:, None] * DIM + channel[None, :]
        keys = tl.load(k_ptr + offset, mask=mask, other=0.0)
        scores = block_scores(q, keys, scale, SOFTCAP, k_scale_ptr, first + key, known)
        scores = tl.where(known[None, :], scores, float("-inf"))
        values = tl.load(v_ptr + offset, mask=mask, other=0.0).to(q.dtype)
        best, norm, acc = fold_block(
            best, norm, acc, scores, values, scale, v_scale_ptr, first + key, known
        )
    acc = lowered(acc, v_scale_ptr)
    out_row = q_row * num_parts + first_part + tl.load(item) * num_chunks + chunk
    part = part_ptr + out_row[:, None] * DIM + channel[None, :]
    tl.store(part, acc / norm[:, None], mask=q_mask)
    tl.store(stat_ptr + out_row, best + tl.log2(norm), mask=is_row)
