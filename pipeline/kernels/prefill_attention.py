"""Attention of packed runs of new tokens over keys and values in up to three segments of the cache.

A run sees all of its earlier segments (job prefix, group) and, causally, its last one, which its
own tokens end. Tokens of one span (an image of Gemma) see each other; a sliding window cuts what
lies too far back, and blocks wholly outside it are not read. Nothing is padded: a program takes one
tile of queries of one run and reads the keys in blocks counted from the sequence's start, wherever
its segments part, so that what a token computes does not depend on how its sequence is shared. A
tile is many tokens of one head or, of a short run, few tokens of all heads that share their keys.
Source: Dao, "FlashAttention-2" (2023), algorithm 1. Knows no sequence and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, shared_memory, tl, triton, use_triton
from pipeline.kernels.decode_attention import capped_attention
from pipeline.kernels.flash_parts import block_scores, fold_block, key_places
from pipeline.kernels.transfer import to_device

BLOCK_Q = 64
BLOCK_KV = 64
WIDE_BYTES = 164_000  # of shared memory, for heads of 256 values in blocks of BLOCK_KV keys
MAX_SEGMENTS = 3
TABLE_WIDTH = 4 + 2 * MAX_SEGMENTS - 1


@dataclass(frozen=True, slots=True)
class Run:
    """Queries `[q_start, q_start + q_length)` and the (start, length) of their key segments.

    `spans` are (start, length) ranges of the run's queries that see each other.
    """

    q_start: int
    q_length: int
    segments: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...] = ()

    def ahead(self) -> Tensor:
        """How many later keys each query sees, int32 [q_length]."""
        ahead = torch.zeros(self.q_length, dtype=torch.int32)
        for start, length in self.spans:
            ahead[start : start + length] = torch.arange(length - 1, -1, -1, dtype=torch.int32)
        return ahead


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Runs of one shape, for the reference: query index [B, Tq], key index [B, Tk]."""

    queries: Tensor
    keys: Tensor
    ahead: Tensor | None  # [Tq], as of a `Run`

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys each query sees; None: all of them."""
        length, total = self.queries.shape[1], self.keys.shape[1]
        if length == 1 and window is None:
            return None
        key = torch.arange(total, device=self.queries.device)
        at = torch.arange(total - length, total, device=self.queries.device)[:, None]
        seen = key <= (at if self.ahead is None else at + self.ahead[:, None])
        return seen if window is None else seen & (key > at - window)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The runs of one batch; for kernels also their tables.

    `table` [R, 9] int32: q_start, q_length, the number of keys before the run's own and with them,
    then what `key_places` needs. `ahead` [T] int32 where a run has spans: how many later keys a
    query sees.
    """

    runs: tuple[Run, ...]
    rectangles: tuple[Rectangle, ...] = ()
    table: Tensor | None = None
    ahead: Tensor | None = None
    _tiles: dict[int, Tensor] = field(default_factory=dict, kw_only=True)

    def tiles(self, group: int) -> Tensor:
        """int32 [N, 3] of run, first query, and which of the `group` heads that share keys.

        -1: all of them, BLOCK_Q // group tokens. Made once a batch for all layers.
        """
        if group not in self._tiles:
            assert self.table is not None
            made = torch.tensor(_tiles(self.runs, group), dtype=torch.int32).view(-1, 3)
            self._tiles[group] = to_device(made, self.table.device)
        return self._tiles[group]


def plan_prefill(runs: Sequence[Run], device: torch.device, triton_path: bool) -> PrefillPlan:
    """Lay out a batch's runs; made on the host, once a batch for all layers."""
    if not triton_path:
        return PrefillPlan(tuple(runs), tuple(_rectangles(runs, device)))
    table = []
    for run in runs:
        total = sum(length for _, length in run.segments)
        table.append([run.q_start, run.q_length, total - run.q_length, total, *_places(run)])
    tables = [torch.tensor(table, dtype=torch.int32)]
    if any(run.spans for run in runs):
        ahead = torch.zeros(max(r.q_start + r.q_length for r in runs), dtype=torch.int32)
        for run in runs:
            ahead[run.q_start : run.q_start + run.q_length] = run.ahead()
        tables.append(ahead)
    return PrefillPlan(tuple(runs), (), *(to_device(t, device) for t in tables))


def _tiles(runs: Sequence[Run], group: int) -> list[tuple[int, int, int]]:
    """As `PrefillPlan.tiles`, most keys first, so that the grid's tail is short work.

    A run is packed where that saves an eighth of its tiles.
    """
    found: list[tuple[int, int, int]] = []
    together = BLOCK_Q // group
    for number, run in enumerate(runs):
        plain = [(number, q, i) for q in range(0, run.q_length, BLOCK_Q) for i in range(group)]
        packed = [(number, q, -1) for q in range(0, run.q_length, together or run.q_length)]
        found += packed if together and 8 * len(packed) <= 7 * len(plain) else plain
    earlier = [sum(length for _, length in run.segments) - run.q_length for run in runs]
    return sorted(found, key=lambda tile: -(earlier[tile[0]] + tile[1]))


def _places(run: Run) -> list[int]:
    """Where the first two segments end in the sequence, and how far each lies from there."""
    segments = ((0, 0),) * (MAX_SEGMENTS - len(run.segments)) + run.segments
    (first, one), (second, two), (third, _) = segments
    return [one, one + two, first, second - one, third - one - two]


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`q` [T, Hq, D] over `k`, `v` [Hk, N, D] -> [T, Hq, D].

    With a `window` no query sees further back than `window` keys, its own among them; `softcap` c
    makes scores c·tanh(s / c).
    """
    if plan.table is not None:
        return _prefill_triton(q, k, v, plan, scale, window, softcap)
    return prefill_attention_reference(q, k, v, plan, scale, window, softcap)


def _rectangles(runs: Sequence[Run], device: torch.device) -> list[Rectangle]:
    shapes: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        shape = (run.q_length, sum(s[1] for s in run.segments), run.spans)
        shapes.setdefault(shape, []).append(run)
    found = []
    for members in shapes.values():
        queries = [torch.arange(r.q_start, r.q_start + r.q_length) for r in members]
        keys = [torch.cat([torch.arange(s, s + n) for s, n in r.segments]) for r in members]
        ahead = members[0].ahead().to(device) if members[0].spans else None
        index = torch.stack(queries).to(device), torch.stack(keys).to(device)
        found.append(Rectangle(*index, ahead))
    return found


def prefill_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    out = torch.empty_like(q)
    for rectangle in plan.rectangles:
        rows = q[rectangle.queries].transpose(1, 2)  # [B, Hq, Tq, D]
        keys, values = (x[:, rectangle.keys].transpose(0, 1) for x in (k, v))
        mask = rectangle.mask(window)
        if softcap is None:
            dense = functional.scaled_dot_product_attention(
                rows, keys, values, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[0]
            )
        else:
            group = q.shape[1] // k.shape[0]
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            dense = capped_attention(rows, keys, values, mask, scale, softcap)
        out[rectangle.queries] = dense.transpose(1, 2)
    return out


@triton.jit
def _take_block(
    best, norm, acc, q, k_ptr, v_ptr, begin, entry, earliest, latest, total, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys from `begin` in. MASKED: a row sees those in [earliest, latest]."""
    key = begin + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    offset = key_places(key, entry).to(tl.int64)[:, None] * DIM + channel[None, :]
    if MASKED:
        mask = (key < total)[:, None] & (channel[None, :] < DIM)
        scores = block_scores(q, tl.load(k_ptr + offset, mask=mask, other=0.0), scale, SOFTCAP)
        seen = (key[None, :] >= earliest[:, None]) & (key[None, :] <= latest[:, None])
        scores = tl.where(seen & (key < total)[None, :], scores, float("-inf"))
        values = tl.load(v_ptr + offset, mask=mask, other=0.0)
    else:
        scores = block_scores(q, tl.load(k_ptr + offset), scale, SOFTCAP)
        values = tl.load(v_ptr + offset)
    return fold_block(best, norm, acc, scores, values, scale)


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, table_ptr, ahead_ptr, head_stride, q_stride, scale,
    HQ: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 3
    first = tl.load(tile + 1)
    which = tl.load(tile + 2)
    entry = table_ptr + tl.load(tile) * WIDTH
    q_start, q_length = tl.load(entry), tl.load(entry + 1)
    position, total = tl.load(entry + 2), tl.load(entry + 3)
    # NOTE: where GROUP does not divide BLOCK_M, lines of a packed tile are left over; they repeat
    # its last token, so that no key is read for them alone.
    PACKED: tl.constexpr = max(1, BLOCK_M // GROUP)
    line = tl.arange(0, BLOCK_M)
    row = first + tl.where(which < 0, tl.minimum(line // GROUP, PACKED - 1), line)
    head = kv_head * GROUP + tl.where(which < 0, line % GROUP, which)
    here = (row < q_length) & (line < tl.where(which < 0, PACKED * GROUP, BLOCK_M))
    channel = tl.arange(0, BLOCK_D)
    q_mask = here[:, None] & (channel[None, :] < DIM)
    q_offset = (q_start + row).to(tl.int64)[:, None] * q_stride + head[:, None] * DIM
    q = tl.load(q_ptr + q_offset + channel[None, :], mask=q_mask, other=0.0)
    k_rows = k_ptr + kv_head.to(tl.int64) * head_stride
    v_rows = v_ptr + kv_head.to(tl.int64) * head_stride
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    latest = position + row  # key that a row sees
    if SPANS:
        latest += tl.load(ahead_ptr + q_start + row, mask=row < q_length, other=0)
    stop = tl.minimum(total, tl.max(latest, 0) + 1)
    earliest = row * 0
    low = 0
    if WINDOW > 0:
        earliest = position + row - WINDOW + 1
        low = tl.maximum(position + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    # Blocks that every row sees whole need no mask; with a window, where it cuts no row's keys.
    full = low
    if DIM == BLOCK_D:
        shared = tl.min(latest, 0) + 1 if SPANS else position + first + 1
        full = tl.maximum(tl.minimum(total, shared), 0) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            full = tl.where(position + first + BLOCK_M <= WINDOW, full, low)
    for begin in range(low, full, BLOCK_N):
        best, norm, acc = _take_block(
            best, norm, acc, q, k_rows, v_rows, begin, entry + 4, earliest, latest, total, scale,
            DIM, BLOCK_D, BLOCK_N, SOFTCAP, False,
        )  # fmt: skip
    for begin in range(full, stop, BLOCK_N):
        best, norm, acc = _take_block(
            best, norm, acc, q, k_rows, v_rows, begin, entry + 4, earliest, latest, total, scale,
            DIM, BLOCK_D, BLOCK_N, SOFTCAP, True,
        )  # fmt: skip
    out = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_row = (q_start + row).to(tl.int64) * HQ + head
    out_offset = out_row[:, None] * DIM + channel[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def _prefill_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_heads, dim = q.shape[1:]
    group = num_heads // k.shape[0]
    tiles = plan.tiles(group)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = max(16, next_power_of_2(dim))
    keys, stages = BLOCK_KV, 3
    if block_d > 128:
        keys, stages = (BLOCK_KV, 2) if shared_memory(q.device) >= WIDE_BYTES else (32, 1)
    _prefill_kernel[(k.shape[0], len(tiles))](
        q, k, v, out, tiles, plan.table, plan.ahead, k.stride(0), q.stride(0), scale,
        HQ=num_heads, GROUP=group, DIM=dim, WIDTH=TABLE_WIDTH,
        BLOCK_D=block_d, BLOCK_M=BLOCK_Q, BLOCK_N=keys, WINDOW=window or 0,
        SOFTCAP=softcap or 0.0, SPANS=plan.ahead is not None,
        num_warps=4 if block_d <= 128 else 8, num_stages=stages,
    )  # fmt: skip
    return out


def prefill_plan_for(runs: Sequence[Run], like: Tensor) -> PrefillPlan:
    """`plan_prefill` for the implementation that `like`'s device takes."""
    return plan_prefill(runs, like.device, use_triton(like))
