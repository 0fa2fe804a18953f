"""Attention of packed runs of new tokens over keys and values in up to S segments of the cache.

A run sees all of its earlier segments (job prefix, group) and, causally, its last one, which its
own tokens end. Nothing is padded: a program takes one block of queries of one run. Source: Dao,
"FlashAttention-2" (2023), algorithm 1. Knows no sequence and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton

BLOCK_Q = 128
BLOCK_KV = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Queries `[q_start, q_start + q_length)` and the (start, length) of their key segments."""

    q_start: int
    q_length: int
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The runs of one batch; on a GPU also their blocks.

    `blocks` [B, 2] int32: run, first query. `table` [R, 2 + 2 S] int32: q_start, q_length and
    the segments.
    """

    runs: tuple[Run, ...]
    rectangles: tuple[tuple[tuple[int, ...], Tensor, Tensor], ...] = ()
    blocks: Tensor | None = None
    table: Tensor | None = None
    num_segments: int = 0


def plan_prefill(runs: Sequence[Run], device: torch.device, triton_path: bool) -> PrefillPlan:
    """Lay out a batch's runs; made on the host, once a batch for all layers."""
    if not triton_path:
        return PrefillPlan(tuple(runs), tuple(_rectangles(runs, device)))
    width = max(len(run.segments) for run in runs)
    table, blocks = [], []
    for number, run in enumerate(runs):
        # NOTE: missing leading segments are empty, so that the causal one is always the last.
        segments = ((0, 0),) * (width - len(run.segments)) + run.segments
        table.append([run.q_start, run.q_length, *(x for s in segments for x in s)])
        # long blocks first: the tail of the grid is then short work
        blocks += [[number, q] for q in range(0, run.q_length, BLOCK_Q)]
    blocks.sort(key=lambda b: -b[1])
    pinned = device.type == "cuda"
    as_tensor = [torch.tensor(x, dtype=torch.int32, pin_memory=pinned) for x in (blocks, table)]
    on_device = [t.to(device, non_blocking=True) for t in as_tensor]
    return PrefillPlan(tuple(runs), (), on_device[0], on_device[1], width)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """`q` [T, Hq, D] over `k`, `v` [Hk, N, D] -> [T, Hq, D]."""
    if plan.blocks is not None:
        return _prefill_triton(q, k, v, plan, scale)
    return prefill_attention_reference(q, k, v, plan, scale)


def _rectangles(
    runs: Sequence[Run], device: torch.device
) -> list[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Runs of one shape as (lengths, query index [B, Tq], key index [B, Tk])."""
    shapes: dict[tuple[int, ...], list[Run]] = {}
    for run in runs:
        shapes.setdefault((run.q_length, *(s[1] for s in run.segments)), []).append(run)
    found = []
    for shape, members in shapes.items():
        queries = [torch.arange(r.q_start, r.q_start + r.q_length) for r in members]
        keys = [torch.cat([torch.arange(s, s + n) for s, n in r.segments]) for r in members]
        found.append((shape, torch.stack(queries).to(device), torch.stack(keys).to(device)))
    return found


def prefill_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float
) -> Tensor:
    out = torch.empty_like(q)
    for shape, queries, keys in plan.rectangles:
        length, total = shape[0], sum(shape[1:])
        rows = q[queries].transpose(1, 2)  # [B, Hq, Tq, D]
        mask = None
        if length > 1:
            mask = torch.ones(length, total, dtype=torch.bool, device=q.device)
            mask = mask.tril(total - length)
        dense = functional.scaled_dot_product_attention(
            rows, k[:, keys].transpose(0, 1), v[:, keys].transpose(0, 1), mask, scale=scale,
            enable_gqa=q.shape[1] != k.shape[0],
        )  # fmt: skip
        out[queries] = dense.transpose(1, 2)
    return out


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, table_ptr, head_stride, q_stride, scale,
    HQ: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.program_id(1)
    run = tl.load(blocks_ptr + block * 2)
    first = tl.load(blocks_ptr + block * 2 + 1)
    entry = table_ptr + run * (2 + 2 * SEGMENTS)
    q_start = tl.load(entry)
    q_length = tl.load(entry + 1)
    row = first + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    inside = channel[None, :] < DIM
    q_mask = (row[:, None] < q_length) & inside
    q_offset = (q_start + row[:, None]).to(tl.int64) * q_stride + head * DIM + channel[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0)
    base_k = k_ptr + (head // GROUP).to(tl.int64) * head_stride
    base_v = v_ptr + (head // GROUP).to(tl.int64) * head_stride
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * 1.4426950408889634
    for s in tl.static_range(SEGMENTS):
        start = tl.load(entry + 2 + 2 * s).to(tl.int64)
        length = tl.load(entry + 3 + 2 * s)
        stop = length
        shift = length - q_length  # of the last segment: keys before the run's own
        if s == SEGMENTS - 1:
            stop = tl.minimum(length, first + shift + BLOCK_M)
        for begin in range(0, stop, BLOCK_N):
            key = begin + tl.arange(0, BLOCK_N)
            valid = key < stop
            offset = (start + key)[:, None] * DIM + channel[None, :]
            kv_mask = valid[:, None] & inside
            keys = tl.load(base_k + offset, mask=kv_mask, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
            seen = valid[None, :]
            if s == SEGMENTS - 1:
                seen = seen & (key[None, :] <= row[:, None] + shift)
            scores = tl.where(seen, scores, float("-inf"))
            peak = tl.maximum(best, tl.max(scores, 1))
            safe = tl.where(peak > float("-inf"), peak, 0.0)
            weight = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(best - safe)
            norm = norm * fade + tl.sum(weight, 1)
            values = tl.load(base_v + offset, mask=kv_mask, other=0.0)
            weight = weight.to(values.dtype)
            acc = acc * fade[:, None] + tl.dot(weight, values, input_precision="ieee")
            best = peak
    out = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_offset = (q_start + row[:, None]).to(tl.int64) * HQ * DIM + head * DIM + channel[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def _prefill_triton(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    assert plan.blocks is not None
    assert plan.table is not None
    num_heads, dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(num_heads, len(plan.blocks))](
        q, k, v, out, plan.blocks, plan.table, k.stride(0), q.stride(0), scale,
        HQ=num_heads, GROUP=num_heads // k.shape[0], DIM=dim, SEGMENTS=plan.num_segments,
        BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_M=BLOCK_Q, BLOCK_N=BLOCK_KV,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def prefill_plan_for(runs: Sequence[Run], like: Tensor) -> PrefillPlan:
    """`plan_prefill` for the implementation that `like`'s device takes."""
    return plan_prefill(runs, like.device, use_triton(like))
