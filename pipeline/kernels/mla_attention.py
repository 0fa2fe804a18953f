"""Attention over a compressed cache: one row a token, which all heads read as key and as value.

A row holds ROPE rotated values and then the latent; scores take the whole row, the output is the
latent's weighted sum ("absorbed" queries). Segments and plans are those of `decode_attention` and
`prefill_attention`; the join of split lanes is `decode_attention`'s. Source: DeepSeek-AI,
"DeepSeek-V2" (2024), section 2.1 and appendix C. Knows no weight and no schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, tl, triton
from pipeline.kernels.decode_attention import DecodePlan, join_splits
from pipeline.kernels.flash_parts import fold_block, key_places, lane_chunk, lane_places
from pipeline.kernels.mla_pack import turn_and_cache
from pipeline.kernels.prefill_attention import BLOCK_Q, TABLE_WIDTH, PrefillPlan

HEADS = 16  # of one program; fewer heads are padded
TOKENS = 4  # of one program in prefill
BLOCK_KV = 32


def mla_rope_and_cache(
    packed: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places: Tensor
) -> Tensor:
    """Rotate `packed` [T, (H + 1) D], H queries and the new row, in place; return the queries.

    They are [T, H, D]. The row goes to `cache` [N, D] at `places` [T] (int64).
    """
    rows = packed.view(len(packed), -1, cache.shape[-1])
    turn_and_cache(rows, cos, sin, cache, places)
    return rows[:, :-1]


def mla_decode(q: Tensor, cache: Tensor, plan: DecodePlan, scale: float, rope: int) -> Tensor:
    """One token a lane: `q` [B, H, D] over `cache` [N, D] -> [B, H, D - rope].

    A lane without keys gives zeros.
    """
    if plan.index is None:
        return _decode_triton(q, cache, plan, scale, rope)
    return mla_decode_reference(q, cache, plan, scale, rope)


def mla_decode_reference(
    q: Tensor, cache: Tensor, plan: DecodePlan, scale: float, rope: int
) -> Tensor:
    assert plan.index is not None
    assert plan.mask is not None
    rows = cache[plan.index][:, None]  # [B, 1, L, D]
    out = functional.scaled_dot_product_attention(
        q[:, None], rows, rows[..., rope:], plan.mask, scale=scale
    )
    return torch.nan_to_num(out[:, 0])


def mla_prefill(q: Tensor, cache: Tensor, plan: PrefillPlan, scale: float, rope: int) -> Tensor:
    """Packed runs: `q` [T, H, D] over `cache` [N, D] -> [T, H, D - rope]."""
    if plan.table is not None:
        return _prefill_triton(q, cache, plan, scale, rope)
    return mla_prefill_reference(q, cache, plan, scale, rope)


def mla_prefill_reference(
    q: Tensor, cache: Tensor, plan: PrefillPlan, scale: float, rope: int
) -> Tensor:
    out = q.new_empty(*q.shape[:2], q.shape[2] - rope)
    for rectangle in plan.rectangles:
        queries = q[rectangle.queries].transpose(1, 2)  # [B, H, Tq, D]
        rows = cache[rectangle.keys][:, None].expand(-1, q.shape[1], -1, -1)
        mask = rectangle.mask(None)
        dense = functional.scaled_dot_product_attention(
            queries, rows, rows[..., rope:], mask, scale=scale
        )
        out[rectangle.queries] = dense.transpose(1, 2)
    return out


@triton.jit
def _scores(q_rope, q_latent, ropes, latents):
    """Scores of queries with rows: rotated part and latent."""
    scores = tl.dot(q_rope, tl.trans(ropes), input_precision="ieee")
    scores += tl.dot(q_latent, tl.trans(latents), input_precision="ieee")
    return scores


@triton.jit
def _decode_kernel(
    q_ptr, cache_ptr, seg_ptr, part_ptr, stat_ptr, scale, num_splits, q_stride,
    NUM_HEADS: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    DIM: tl.constexpr = ROPE + RANK
    first, stop = lane_chunk(seg_ptr, lane, split, num_splits, SEGMENTS, 0, BLOCK)
    turned, latent = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_L)
    is_head = head[:, None] < NUM_HEADS
    q_row = q_ptr + lane.to(tl.int64) * q_stride + head[:, None] * DIM
    q_rope = tl.load(q_row + turned[None, :], mask=is_head & (turned < ROPE)[None, :], other=0.0)
    q_latent = tl.load(
        q_row + ROPE + latent[None, :], mask=is_head & (latent < RANK)[None, :], other=0.0
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_L], tl.float32)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        address = lane_places(place, seg_ptr, lane, SEGMENTS)
        valid = (place < stop)[:, None]
        row = cache_ptr + address[:, None] * DIM
        ropes = tl.load(row + turned[None, :], mask=valid & (turned < ROPE)[None, :], other=0.0)
        latents = tl.load(
            row + ROPE + latent[None, :], mask=valid & (latent < RANK)[None, :], other=0.0
        )
        scores = _scores(q_rope, q_latent, ropes, latents)
        scores = tl.where((place < stop)[None, :], scores, float("-inf"))
        best, norm, acc = fold_block(best, norm, acc, scores, latents, scale)
    out_row = (lane * NUM_HEADS + head).to(tl.int64) * num_splits + split
    safe = tl.where(norm > 0, norm, 1.0)
    part = part_ptr + out_row[:, None] * RANK + latent[None, :]
    out = (acc / safe[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(part, out, mask=is_head & (latent < RANK)[None, :])
    if num_splits > 1:
        weight_sum = tl.where(norm > 0, best + tl.log2(safe), float("-inf"))
        tl.store(stat_ptr + out_row, weight_sum, mask=head < NUM_HEADS)


def _decode_triton(q: Tensor, cache: Tensor, plan: DecodePlan, scale: float, rope: int) -> Tensor:
    lanes, heads, dim = q.shape
    rank, splits = dim - rope, plan.num_splits
    if q.stride(1) != dim or q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(lanes, heads, rank, dtype=q.dtype, device=q.device)
    if lanes == 0:
        return out
    single = splits == 1
    part = out if single else q.new_empty(lanes, heads, splits, rank, dtype=torch.float32)
    stat = q.new_empty(lanes, heads, splits, dtype=torch.float32)
    _decode_kernel[(lanes, triton.cdiv(heads, HEADS), splits)](
        q, cache, plan.segments, part, stat, scale, splits, q.stride(0),
        NUM_HEADS=heads, ROPE=rope, RANK=rank, SEGMENTS=plan.segments.shape[1], ROWS=HEADS,
        BLOCK_R=max(16, next_power_of_2(rope)), BLOCK_L=max(16, next_power_of_2(rank)),
        BLOCK=16 if q.element_size() > 2 else BLOCK_KV, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out if single else join_splits(part, stat, out)


@triton.jit
def _prefill_kernel(
    q_ptr, cache_ptr, out_ptr, tiles_ptr, table_ptr, scale, q_stride,
    NUM_HEADS: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    PER_TILE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS queries of one run, ROWS heads of each."""
    tile = tiles_ptr + tl.program_id(0) // PER_TILE * 3
    run = tl.load(tile)
    first = tl.load(tile + 1) + tl.program_id(0) % PER_TILE * TOKENS
    DIM: tl.constexpr = ROPE + RANK
    entry = table_ptr + run * WIDTH
    q_start = tl.load(entry)
    q_length = tl.load(entry + 1)
    if first >= q_length:  # the run's last tile may hold fewer queries
        return
    position = tl.load(entry + 2)
    pair = tl.arange(0, TOKENS * ROWS)
    token = first + pair // ROWS
    head = tl.program_id(1) * ROWS + pair % ROWS
    is_row = ((token < q_length) & (head < NUM_HEADS))[:, None]
    turned, latent = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_L)
    q_row = q_ptr + (q_start + token[:, None]).to(tl.int64) * q_stride + head[:, None] * DIM
    q_rope = tl.load(q_row + turned[None, :], mask=is_row & (turned < ROPE)[None, :], other=0.0)
    q_latent = tl.load(
        q_row + ROPE + latent[None, :], mask=is_row & (latent < RANK)[None, :], other=0.0
    )
    best = tl.full([TOKENS * ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([TOKENS * ROWS], tl.float32)
    acc = tl.zeros([TOKENS * ROWS, BLOCK_L], tl.float32)
    stop = tl.minimum(tl.load(entry + 3), position + first + TOKENS)
    for begin in range(0, stop, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        valid = (key < stop)[:, None]
        row = cache_ptr + key_places(key, entry + 4).to(tl.int64)[:, None] * DIM
        ropes = tl.load(row + turned[None, :], mask=valid & (turned < ROPE)[None, :], other=0.0)
        latents = tl.load(
            row + ROPE + latent[None, :], mask=valid & (latent < RANK)[None, :], other=0.0
        )
        scores = _scores(q_rope, q_latent, ropes, latents)
        seen = (key[None, :] <= position + token[:, None]) & (key < stop)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        best, norm, acc = fold_block(best, norm, acc, scores, latents, scale)
    out = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_row = (q_start + token[:, None]).to(tl.int64) * NUM_HEADS + head[:, None]
    tl.store(
        out_ptr + out_row * RANK + latent[None, :],
        out.to(out_ptr.dtype.element_ty), mask=is_row & (latent < RANK)[None, :],
    )  # fmt: skip


def _prefill_triton(q: Tensor, cache: Tensor, plan: PrefillPlan, scale: float, rope: int) -> Tensor:
    num_tokens, heads, dim = q.shape
    rank = dim - rope
    if q.stride(1) != dim or q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(num_tokens, heads, rank, dtype=q.dtype, device=q.device)
    wide = q.element_size() > 2  # float32 fills the shared memory sooner
    together = 1 if wide else TOKENS
    per_tile = BLOCK_Q // together
    tiles = plan.tiles(1)  # of one head, so that none is packed
    _prefill_kernel[(len(tiles) * per_tile, triton.cdiv(heads, HEADS))](
        q, cache, out, tiles, plan.table, scale, q.stride(0),
        NUM_HEADS=heads, ROPE=rope, RANK=rank, WIDTH=TABLE_WIDTH, PER_TILE=per_tile,
        TOKENS=together, ROWS=HEADS, BLOCK_R=max(16, next_power_of_2(rope)),
        BLOCK_L=max(16, next_power_of_2(rank)), BLOCK_N=16 if wide else BLOCK_KV,
        num_warps=4 if wide else 8, num_stages=1 if wide else 2,
    )  # fmt: skip
    return out
