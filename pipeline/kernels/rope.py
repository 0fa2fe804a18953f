"""Rotary position embedding, NeoX half rotation: for vision heads, and for the decoder's queries
and keys together with the write of keys and values into the cache.

Angles come as float32 cosines and sines [T, R/2]; R <= D channels turn, the rest pass unchanged.
Products are taken in float32 and rounded once. Source: Su et al., "RoFormer" (2021), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.cached_rows import CachedRows, parts, put_rows
from pipeline.kernels.fp8 import LARGEST, SMALLEST_SCALE


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [T, H, D] by the angles [T, R/2] of each token; heads may be strided."""
    if use_triton(x) and x.stride(-1) == 1:
        return _rotate_triton(x, cos.contiguous(), sin.contiguous())
    return rotate_reference(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], -1)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: CachedRows,
    v_cache: CachedRows,
    places: Tensor,
    num_heads: int,
) -> Tensor:
    """Rotate queries and keys of `qkv` [T, (Hq + 2 Hk) D]; return the queries [T, Hq, D].

    Keys and values go to `k_cache`, `v_cache` [Hk, N, D] at `places` [T] (int64); where these are
    float8, each row is rounded as elsewhere and then quantised.
    """
    if use_triton(qkv):
        return _rope_and_cache_triton(qkv, cos, sin, k_cache, v_cache, places, num_heads)
    return rope_and_cache_reference(qkv, cos, sin, k_cache, v_cache, places, num_heads)


def rope_and_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: CachedRows,
    v_cache: CachedRows,
    places: Tensor,
    num_heads: int,
) -> Tensor:
    num_kv_heads, _, head_dim = parts(k_cache)[0].shape
    heads = qkv.view(len(qkv), -1, head_dim)
    turned = rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
    put_rows(k_cache, places, turned[:, num_heads:])
    put_rows(v_cache, places, heads[:, num_heads + num_kv_heads :])
    return turned[:, :num_heads]


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, token_stride, head_stride, num_heads,
    DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS heads: both halves, then the channels that pass."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    base = x_ptr + token * token_stride + head * head_stride
    out = out_ptr + (token * num_heads + head) * DIM
    turning = (head < num_heads) & (lane < HALF)
    cos = tl.load(cos_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    first = tl.load(base + lane, mask=turning, other=0.0).to(tl.float32)
    second = tl.load(base + HALF + lane, mask=turning, other=0.0).to(tl.float32)
    tl.store(out + lane, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=turning)
    turned = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
    tl.store(out + HALF + lane, turned, mask=turning)
    if DIM > 2 * HALF:
        for start in tl.static_range(2 * HALF, DIM, BLOCK):
            passing = (head < num_heads) & (start + lane < DIM)
            same = tl.load(base + start + lane, mask=passing, other=0.0)
            tl.store(out + start + lane, same, mask=passing)


def _rotate_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        half, block = cos.shape[-1], 32
        _rotate_kernel[(tokens, triton.cdiv(heads, block))](
            x, cos, sin, out, x.stride(0), x.stride(1), heads, DIM=dim, HALF=half,
            HEADS=block, BLOCK=max(16, next_power_of_2(half)), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _rotated_keys(
    base, cos_ptr, sin_ptr, row, channel, is_row, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """A token's keys [rows, DIM] as whole rows, in float32."""
    low = channel < HALF
    inside, turning = is_row & (channel < DIM), is_row & (channel < 2 * HALF)
    angle = tl.where(low, channel, channel - HALF)
    cos = tl.load(cos_ptr + angle, mask=channel < 2 * HALF, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=channel < 2 * HALF, other=0.0)
    partner = tl.where(low, channel + HALF, channel - HALF)
    x = tl.load(base + row * DIM + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(base + row * DIM + partner, mask=turning, other=0.0).to(tl.float32)
    return x * cos + tl.where(low, -other, other) * sin


@triton.jit
def _store_float8(
    x, out_ptr, scale_ptr, cached, channel, is_row, DIM: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """Quantise the rows `x` [rows, DIM] and store them as the cache's rows `cached` [rows, 1]."""
    wide = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 1)[:, None] / LARGEST, SMALLEST)
    eight = (wide / scale).to(tl.float8e4nv)
    tl.store(out_ptr + cached * DIM + channel, eight, mask=is_row & (channel < DIM))
    tl.store(scale_ptr + cached, scale, mask=is_row)


@triton.jit
def _put_float8(
    qkv, cos_ptr, sin_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, place, num_rows,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    KV_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of the token at `qkv`; a head has `num_rows` rows in the cache."""
    row = tl.arange(0, KV_ROWS)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    is_row = row < NUM_KV
    cached = row.to(tl.int64) * num_rows + place
    base = qkv + NUM_HEADS * DIM
    key = _rotated_keys(base, cos_ptr, sin_ptr, row, channel, is_row, DIM, HALF)
    key = key.to(qkv.dtype.element_ty)
    _store_float8(key, k_ptr, k_scale_ptr, cached, channel, is_row, DIM, LARGEST, SMALLEST)
    values = base + (NUM_KV + row) * DIM + channel
    value = tl.load(values, mask=is_row & (channel < DIM), other=0.0)
    _store_float8(value, v_ptr, v_scale_ptr, cached, channel, is_row, DIM, LARGEST, SMALLEST)


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, places_ptr,
    head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, KV_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One program a token: [heads, HALF] tiles of both halves, then the channels that pass.

    With scales the tiles are of queries alone; keys and values follow as whole rows.
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + token)
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    base = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV) * DIM + head * DIM
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV)
    q_out = q_ptr + (token * NUM_HEADS + head) * DIM
    k_out = k_ptr + (head - NUM_HEADS).to(tl.int64) * head_stride + place * DIM
    turning = (is_q | is_k) & (lane < HALF)
    cos = tl.load(cos_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + lane, mask=lane < HALF, other=0.0)
    first = tl.load(base + lane, mask=turning, other=0.0).to(tl.float32)
    second = tl.load(base + HALF + lane, mask=turning, other=0.0).to(tl.float32)
    low = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    high = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    tl.store(q_out + lane, low, mask=turning & is_q)
    tl.store(q_out + HALF + lane, high, mask=turning & is_q)
    if k_scale_ptr is None:
        tl.store(k_out + lane, low, mask=turning & is_k)
        tl.store(k_out + HALF + lane, high, mask=turning & is_k)
    if DIM > 2 * HALF:
        for start in tl.static_range(2 * HALF, DIM, BLOCK):
            rest = start + lane
            passing = (is_q | is_k) & (rest < DIM)
            same = tl.load(base + rest, mask=passing, other=0.0)
            tl.store(q_out + rest, same, mask=passing & is_q)
            if k_scale_ptr is None:
                tl.store(k_out + rest, same, mask=passing & is_k)
    if k_scale_ptr is None:
        is_v = (head >= NUM_HEADS + NUM_KV) & (head < NUM_HEADS + 2 * NUM_KV)
        v_head = (head - NUM_HEADS - NUM_KV).to(tl.int64)
        v_out = v_ptr + v_head * head_stride + place * DIM
        for start in tl.static_range(0, DIM, BLOCK):
            channel = start + lane
            inside = is_v & (channel < DIM)
            tl.store(v_out + channel, tl.load(base + channel, mask=inside, other=0.0), mask=inside)
    else:
        _put_float8(
            qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV) * DIM, cos_ptr + token * HALF,
            sin_ptr + token * HALF, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, place,
            head_stride // DIM, NUM_HEADS, NUM_KV, DIM, HALF, KV_ROWS, BLOCK_D, LARGEST, SMALLEST,
        )  # fmt: skip


def _rope_and_cache_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: CachedRows,
    v_cache: CachedRows,
    places: Tensor,
    num_heads: int,
) -> Tensor:
    (keys, k_scale), (values, v_scale) = parts(k_cache), parts(v_cache)
    num_kv_heads, _, dim = keys.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    q = torch.empty(len(qkv), num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        half = cos.shape[-1]
        _rope_and_cache_kernel[(len(qkv),)](
            qkv, cos, sin, q, keys, values, k_scale, v_scale, places, keys.stride(0),
            NUM_HEADS=num_heads, NUM_KV=num_kv_heads, DIM=dim, HALF=half,
            HEADS=next_power_of_2(num_heads + (2 * num_kv_heads if k_scale is None else 0)),
            BLOCK=max(16, next_power_of_2(half)), KV_ROWS=next_power_of_2(num_kv_heads),
            BLOCK_D=next_power_of_2(dim), LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE, num_warps=4,
        )  # fmt: skip
    return q
