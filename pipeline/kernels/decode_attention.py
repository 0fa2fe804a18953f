"""Attention of one new token a lane over the lane's keys and values, which lie in up to S segments
of the cache (job prefix, group, own).

Split over the length ("flash-decoding"): each program reads one chunk of one lane for one KV head
and serves all its query heads; a second kernel joins the chunks. Source: Dao et al., "Flash-
Decoding for long-context inference" (2023). A sliding window shortens what is read; a soft cap
bends the scores. Knows no sequence and no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import invariant, next_power_of_2, tl, triton, use_triton
from pipeline.kernels.cached_rows import CachedRows, take_rows
from pipeline.kernels.decode_float8 import launch_decode_float8
from pipeline.kernels.flash_parts import block_scores, fold_block, lane_chunk, lane_places
from pipeline.kernels.fp8 import Quantized

BLOCK_KV = 64
INVARIANT_SPLITS = 4  # of each length, where neither lanes nor memory may matter


@dataclass(slots=True)
class DecodePlan:
    """Where each lane's keys lie: `segments` [B, S, 2] int32 of (start, length).

    The reference also keeps the gathered index and mask, made once a step for all layers.
    """

    segments: Tensor
    num_splits: int = 1
    index: Tensor | None = None  # int64 [B, Lmax]
    mask: Tensor | None = None  # bool [B, 1, 1, Lmax]
    windowed: dict[int, Tensor] = field(default_factory=dict)  # window -> mask

    def mask_of(self, window: int | None) -> Tensor:
        """The reference's mask of layers with this window."""
        assert self.mask is not None
        if window is None:
            return self.mask
        if window not in self.windowed:
            length = self.mask.sum(-1, keepdim=True)
            place = torch.arange(self.mask.shape[-1], device=self.mask.device)
            self.windowed[window] = self.mask & (place >= length - window)
        return self.windowed[window]


def plan_decode(segments: Tensor, max_length: int = 0, num_splits: int = 1) -> DecodePlan:
    """`max_length` bounds a lane's total length; the reference needs it, the kernel does not."""
    if use_triton(segments):
        return DecodePlan(segments, num_splits)
    lengths = segments[..., 1].long()
    ends = lengths.cumsum(1)
    place = torch.arange(max(1, max_length), device=segments.device).expand(len(segments), -1)
    which = torch.searchsorted(ends, place.contiguous(), right=True).clamp_(max=ends.shape[1] - 1)
    shift = segments[..., 0].long() - (ends - lengths)
    mask = place < ends[:, -1:]
    index = torch.where(mask, place + shift.gather(1, which), 0)
    return DecodePlan(segments, 1, index, mask[:, None, None])


def choose_splits(num_lanes: int, num_kv_heads: int, max_length: int, device: torch.device) -> int:
    """Enough chunks to fill the device twice, none shorter than four blocks."""
    if device.type != "cuda":
        return 1
    if invariant():
        return INVARIANT_SPLITS
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-2 * num_sms // max(1, num_lanes * num_kv_heads))
    return max(1, min(wanted, max_length // (4 * BLOCK_KV), 32))


def decode_attention(
    q: Tensor,
    k: CachedRows,
    v: CachedRows,
    plan: DecodePlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`q` [B, Hq, D] over `k`, `v` [Hk, N, D] -> [B, Hq, D]. A lane without keys gives zeros.

    With a `window` a lane reads its last `window` keys; `softcap` c makes scores c·tanh(s / c).
    """
    if plan.index is None:
        return _decode_triton(q, k, v, plan, scale, window, softcap)
    return decode_attention_reference(q, k, v, plan, scale, window, softcap)


def decode_attention_reference(
    q: Tensor,
    k: CachedRows,
    v: CachedRows,
    plan: DecodePlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    assert plan.index is not None
    mask = plan.mask_of(window)
    keys, values = (_gathered(x, plan.index, q.dtype) for x in (k, v))
    # NOTE: the query heads of one KV head stand as rows, so that no key is repeated.
    groups = q.shape[1] // keys.shape[1]
    rows = q.view(len(q), keys.shape[1], groups, q.shape[-1])
    if softcap is None:
        out = functional.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
    else:
        out = capped_attention(rows, keys, values, mask, scale, softcap)
    return torch.nan_to_num(out).reshape(q.shape) if not mask.all() else out.reshape(q.shape)


def _gathered(x: CachedRows, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [Hk, N, D] at `index` [B, L] -> [B, Hk, L, D]."""
    return take_rows(x, index.flatten(), dtype).unflatten(1, index.shape).transpose(0, 1)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Dense attention whose scores stay between -softcap and softcap."""
    scores = torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, seg_ptr, part_ptr, stat_ptr, head_stride, scale, num_splits, num_parts,
    HQ: tl.constexpr, HK: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HQ // HK
    first, stop = lane_chunk(seg_ptr, lane, split, num_splits, SEGMENTS, WINDOW, BLOCK)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    q_mask = (row[:, None] < GROUP) & (channel[None, :] < DIM)
    q_offset = (lane * HQ + kv_head * GROUP + row[:, None]) * DIM + channel[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    base_k = k_ptr + kv_head.to(tl.int64) * head_stride
    base_v = v_ptr + kv_head.to(tl.int64) * head_stride
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        address = lane_places(place, seg_ptr, lane, SEGMENTS)
        valid = place < stop
        kv_mask = valid[:, None] & (channel[None, :] < DIM)
        offset = address[:, None] * DIM + channel[None, :]
        keys = tl.load(base_k + offset, mask=kv_mask, other=0.0)
        scores = block_scores(q, keys, scale, SOFTCAP)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        values = tl.load(base_v + offset, mask=kv_mask, other=0.0)
        best, norm, acc = fold_block(best, norm, acc, scores, values, scale)
    # NOTE: rows past GROUP are padding; an empty chunk leaves norm 0 and best -inf.
    out_row = (lane * HQ + kv_head * GROUP + row).to(tl.int64) * num_parts + split
    safe = tl.where(norm > 0, norm, 1.0)
    out = acc / safe[:, None]
    part = part_ptr + out_row[:, None] * DIM + channel[None, :]
    tl.store(part, out.to(part_ptr.dtype.element_ty), mask=q_mask)
    if num_parts > 1:
        weight_sum = tl.where(norm > 0, best + tl.log2(safe), float("-inf"))
        tl.store(stat_ptr + out_row, weight_sum, mask=row < GROUP)


@triton.jit
def _join_kernel(
    part_ptr, stat_ptr, out_ptr, num_splits,
    DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, BLOCK_D)
    inside = split < num_splits
    stat = tl.load(stat_ptr + row * num_splits + split, mask=inside, other=float("-inf"))
    peak = tl.maximum(tl.max(stat, 0), -1e30)  # a lane without keys has no peak
    weight = tl.exp2(stat - peak)
    offset = (row * num_splits + split[:, None]) * DIM + channel[None, :]
    mask = (inside & (stat > float("-inf")))[:, None] & (channel[None, :] < DIM)
    part = tl.load(part_ptr + offset, mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * DIM + channel, out.to(out_ptr.dtype.element_ty), mask=channel < DIM)


def _decode_triton(
    q: Tensor,
    k: CachedRows,
    v: CachedRows,
    plan: DecodePlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    lanes, num_heads, dim = q.shape
    out = torch.empty_like(q)
    if plan.num_splits == 1:
        launch_decode(q, k, v, plan, scale, out, None, 1, window, softcap)
        return out
    part = q.new_empty(lanes, num_heads, plan.num_splits, dim, dtype=torch.float32)
    stat = q.new_empty(lanes, num_heads, plan.num_splits, dtype=torch.float32)
    launch_decode(q, k, v, plan, scale, part, stat, plan.num_splits, window, softcap)
    return join_splits(part, stat, out)


def launch_decode(
    q: Tensor,
    k: CachedRows,
    v: CachedRows,
    plan: DecodePlan,
    scale: float,
    part: Tensor,
    stat: Tensor | None,
    num_parts: int,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Fill the first `plan.num_splits` of `num_parts` parts, and their log sums."""
    lanes, num_heads, dim = q.shape
    if lanes == 0:
        return
    q = q.contiguous()
    if isinstance(k, Quantized):
        assert isinstance(v, Quantized)
        launch_decode_float8(
            q, k, v, plan.segments, plan.num_splits, scale, part, stat, num_parts, window, softcap
        )
        return
    assert not isinstance(v, Quantized)
    num_kv_heads, block_d = k.shape[0], max(16, next_power_of_2(dim))
    _decode_kernel[(lanes, num_kv_heads, plan.num_splits)](
        q, k, v, plan.segments, part, part if stat is None else stat, k.stride(0),
        scale, plan.num_splits, num_parts, HQ=num_heads, HK=num_kv_heads, DIM=dim,
        SEGMENTS=plan.segments.shape[1],
        ROWS=max(16, next_power_of_2(num_heads // num_kv_heads)), BLOCK_D=block_d,
        BLOCK=BLOCK_KV, WINDOW=window or 0, SOFTCAP=softcap or 0.0,
        num_warps=4, num_stages=3 if block_d <= 128 else 2,
    )  # fmt: skip


def join_splits(part: Tensor, stat: Tensor, out: Tensor) -> Tensor:
    """Join the chunks `part` [B, H, S, D] by their log sums `stat` [B, H, S] into `out`."""
    lanes, heads, splits, dim = part.shape
    if lanes == 0:
        return out
    _join_kernel[(lanes * heads,)](
        part, stat, out, splits, DIM=dim, SPLITS=next_power_of_2(splits),
        BLOCK_D=max(16, next_power_of_2(dim)), num_warps=2,
    )  # fmt: skip
    return out
