"""The kernel of `decode_attention` for keys and values in float8.

Two channels of a row are read as one int16: the device's matrix loads turn 16 bits at a time, so
values in bytes would be gathered one by one. Even and odd channels go through products of their
own, in float16 where queries have 16 bits. Knows no plan and no schedule.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton
from pipeline.kernels.cached_rows import pairs
from pipeline.kernels.flash_parts import (
    cap_scores,
    lane_chunk,
    lane_places,
    lifted,
    lowered,
    narrow,
    row_scales,
    weigh,
)
from pipeline.kernels.fp8 import Quantized

# A block of 128 keys has as many bytes as one of 64 in bfloat16, and as many are under way.
BLOCK, STAGES, WARPS = 128, 3, 4
WIDE_BLOCK, WIDE_STAGES = 64, 2  # of heads of more than 128 values


@triton.jit
def split_pairs(packed, ASM: tl.constexpr):
    """Even and odd channels, in float16, of int16 pairs. ASM: three instructions for two pairs."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even = packed.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = (packed >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd


@triton.jit
def _added(acc, fade, weight, values):
    return acc * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, seg_ptr, part_ptr, stat_ptr, num_rows, scale,
    num_splits, num_parts,
    HQ: tl.constexpr, HK: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `decode_attention`'s; a head has `num_rows` rows of DIM / 2 pairs."""
    lane = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HQ // HK
    COPIES: tl.constexpr = 1 if BLOCK >= 128 else 2
    first, stop = lane_chunk(seg_ptr, lane, split, num_splits, SEGMENTS, WINDOW, BLOCK)
    row = tl.arange(0, ROWS)
    pair = tl.arange(0, BLOCK_D // 2)
    head_row = lane * HQ + kv_head * GROUP + row
    q_mask = (row[:, None] < GROUP) & (pair[None, :] < DIM // 2)
    q_offset = head_row[:, None] * DIM + 2 * pair[None, :]
    q_even = narrow(tl.load(q_ptr + q_offset, mask=q_mask, other=0.0))
    q_odd = narrow(tl.load(q_ptr + q_offset + 1, mask=q_mask, other=0.0))
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    even = tl.zeros([ROWS, BLOCK_D // 2], tl.float32)
    odd = tl.zeros([ROWS, BLOCK_D // 2], tl.float32)
    head = kv_head.to(tl.int64) * num_rows
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        valid = place < stop
        cached = head + lane_places(place, seg_ptr, lane, SEGMENTS)
        mask = valid[:, None] & (pair[None, :] < DIM // 2)
        offset = cached[:, None] * (DIM // 2) + pair[None, :]
        k_even, k_odd = split_pairs(tl.load(k_ptr + offset, mask=mask, other=0), ASM)
        scores = tl.dot(q_even, tl.trans(k_even.to(q_even.dtype)), input_precision="ieee")
        scores += tl.dot(q_odd, tl.trans(k_odd.to(q_odd.dtype)), input_precision="ieee")
        scores *= row_scales(k_scale_ptr, cached, valid, COPIES)[None, :]
        scores = cap_scores(scores, scale, SOFTCAP)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        best, norm, weight, fade = weigh(best, norm, scores, scale)
        weight *= lifted(row_scales(v_scale_ptr, cached, valid, COPIES))[None, :]
        v_even, v_odd = split_pairs(tl.load(v_ptr + offset, mask=mask, other=0), ASM)
        even = _added(even, fade, weight, v_even.to(q_even.dtype))
        odd = _added(odd, fade, weight, v_odd.to(q_odd.dtype))
    # NOTE: rows past GROUP are padding; an empty chunk leaves norm 0 and best -inf.
    channel = tl.arange(0, BLOCK_D)
    out_row = head_row.to(tl.int64) * num_parts + split
    safe = tl.where(norm > 0, norm, 1.0)
    out = lowered(tl.interleave(even, odd), v_scale_ptr) / safe[:, None]
    out_mask = (row[:, None] < GROUP) & (channel[None, :] < DIM)
    part = part_ptr + out_row[:, None] * DIM + channel[None, :]
    tl.store(part, out.to(part_ptr.dtype.element_ty), mask=out_mask)
    if num_parts > 1:
        weight_sum = tl.where(norm > 0, best + tl.log2(safe), float("-inf"))
        tl.store(stat_ptr + out_row, weight_sum, mask=row < GROUP)


def launch_decode_float8(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    segments: Tensor,
    num_splits: int,
    scale: float,
    part: Tensor,
    stat: Tensor | None,
    num_parts: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """As `launch_decode`: fill the first `num_splits` of `num_parts` parts, and their log sums."""
    lanes, num_heads, dim = q.shape
    (keys, k_scale), (values, v_scale) = pairs(k), pairs(v)
    num_kv_heads, num_rows, _ = keys.shape
    block_d = max(32, next_power_of_2(dim))
    block, stages = (BLOCK, STAGES) if block_d <= 128 else (WIDE_BLOCK, WIDE_STAGES)
    _decode_kernel[(lanes, num_kv_heads, num_splits)](
        q, keys, values, k_scale, v_scale, segments, part, part if stat is None else stat, num_rows,
        scale, num_splits, num_parts, HQ=num_heads, HK=num_kv_heads, DIM=dim,
        SEGMENTS=segments.shape[1], ROWS=max(16, next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_D=block_d, BLOCK=block, WINDOW=window or 0, SOFTCAP=softcap or 0.0,
        ASM=q.is_cuda, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
