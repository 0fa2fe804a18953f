"""The small steps around latent attention: what surrounds the absorbed queries, and rotation.

`pack_row` puts the queries' rotary parts and the new row, its latent normalised, beside the
absorbed queries; `turn_and_cache` rotates all rotary parts in place and writes the row to the
cache. Knows no projection and no attention.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.rms_norm import rms_norm_reference
from pipeline.kernels.rope import rotate_reference


def pack_row(packed: Tensor, q_rope: Tensor, row: Tensor, weight: Tensor, eps: float) -> None:
    """Fill `packed` [T, H + 1, D] but for the latents of the first H.

    `q_rope` [T, H, R] come first in the queries, `row` [T, D] is the last, its latent normalised.
    """
    if use_triton(packed):
        _pack_triton(packed, q_rope, row, weight, eps)
    else:
        pack_row_reference(packed, q_rope, row, weight, eps)


def pack_row_reference(
    packed: Tensor, q_rope: Tensor, row: Tensor, weight: Tensor, eps: float
) -> None:
    rope = q_rope.shape[-1]
    packed[:, :-1, :rope] = q_rope
    packed[:, -1, :rope] = row[:, :rope]
    packed[:, -1, rope:] = rms_norm_reference(row[:, rope:], weight, eps)[0]


def turn_and_cache(packed: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places: Tensor) -> None:
    """Rotate the first 2 · R values of all heads of `packed` [T, H + 1, D] by `cos`, `sin` [T, R].

    The last goes to `cache` [N, D] at `places` [T] (int64), the others change in place.
    """
    if use_triton(packed):
        _turn_triton(packed, cos, sin, cache, places)
    else:
        turn_and_cache_reference(packed, cos, sin, cache, places)


def turn_and_cache_reference(
    packed: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places: Tensor
) -> None:
    rope = 2 * cos.shape[-1]
    packed[..., :rope] = rotate_reference(packed[..., :rope], cos, sin)
    cache.index_copy_(0, places, packed[:, -1])


@triton.jit
def _pack_kernel(
    packed_ptr, q_ptr, row_ptr, weight_ptr, q_token, q_head, row_token, eps,
    HEADS: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    head, turned = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_R)[None, :]
    DIM: tl.constexpr = ROPE + RANK
    packed = packed_ptr + token * (HEADS + 1) * DIM
    mask = (head < HEADS) & (turned < ROPE)
    q = tl.load(q_ptr + token * q_token + head * q_head + turned, mask=mask, other=0.0)
    tl.store(packed + head * DIM + turned, q, mask=mask)
    row, last = row_ptr + token * row_token, packed + HEADS * DIM
    one = tl.arange(0, BLOCK_R)
    tl.store(last + one, tl.load(row + one, mask=one < ROPE, other=0.0), mask=one < ROPE)
    latent = tl.arange(0, BLOCK_L)
    inside = latent < RANK
    wide = tl.load(row + ROPE + latent, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / RANK + eps)
    kind = packed_ptr.dtype.element_ty
    normed = (wide * scale).to(kind).to(tl.float32)
    weight = tl.load(weight_ptr + latent, mask=inside, other=0.0).to(tl.float32)
    tl.store(last + ROPE + latent, (normed * weight).to(kind), mask=inside)


def _pack_triton(packed: Tensor, q_rope: Tensor, row: Tensor, weight: Tensor, eps: float) -> None:
    tokens, heads, rope = q_rope.shape
    rank = packed.shape[-1] - rope
    if tokens:
        _pack_kernel[(tokens,)](
            packed, q_rope, row, weight, q_rope.stride(0), q_rope.stride(1), row.stride(0), eps,
            HEADS=heads, ROPE=rope, RANK=rank, BLOCK_H=next_power_of_2(heads),
            BLOCK_R=next_power_of_2(rope), BLOCK_L=next_power_of_2(rank), num_warps=4,
        )  # fmt: skip


@triton.jit
def _turn_kernel(
    packed_ptr, cos_ptr, sin_ptr, cache_ptr, places_ptr,
    HEADS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program a token: HEADS queries in place, the row after them to the cache."""
    token = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_R)[None, :]
    base = packed_ptr + token * (HEADS + 1) * DIM + head * DIM + lane
    mask = (head <= HEADS) & (lane < HALF)
    cos = tl.load(cos_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    first = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(base + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = packed_ptr.dtype.element_ty
    low, high = (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)
    is_query = mask & (head < HEADS)
    tl.store(base, low, mask=is_query)
    tl.store(base + HALF, high, mask=is_query)
    place = tl.load(places_ptr + token)
    kept = cache_ptr + place * DIM + head * 0 + lane
    is_row = mask & (head == HEADS)
    tl.store(kept, low, mask=is_row)
    tl.store(kept + HALF, high, mask=is_row)
    rest = 2 * HALF + tl.arange(0, BLOCK_L)
    inside = rest < DIM
    row = packed_ptr + (token * (HEADS + 1) + HEADS) * DIM
    tl.store(cache_ptr + place * DIM + rest, tl.load(row + rest, mask=inside), mask=inside)


def _turn_triton(packed: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places: Tensor) -> None:
    tokens, heads, dim = packed.shape
    if tokens:
        half = cos.shape[-1]
        _turn_kernel[(tokens,)](
            packed, cos.contiguous(), sin.contiguous(), cache, places,
            HEADS=heads - 1, HALF=half, DIM=dim, BLOCK_H=next_power_of_2(heads),
            BLOCK_R=next_power_of_2(half), BLOCK_L=next_power_of_2(dim - 2 * half), num_warps=4,
        )  # fmt: skip
