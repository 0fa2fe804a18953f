"""Steps that the attention kernels over the cache share: where a key lies, scores of a block, and
the running softmax. Knows no mask.
"""

from __future__ import annotations

from pipeline.kernels.backend import tl, triton


@triton.jit
def key_places(key, entry):
    """Cache places of the sequence's keys `key`; `entry` is the segment part of a plan's table."""
    shift = tl.where(key < tl.load(entry), tl.load(entry + 2), tl.load(entry + 3))
    return key + tl.where(key < tl.load(entry + 1), shift, tl.load(entry + 4))


@triton.jit
def lane_length(seg_ptr, lane, SEGMENTS: tl.constexpr):
    """How many keys the segments [B, S, 2] of a lane hold together."""
    total = 0
    for s in tl.static_range(SEGMENTS):
        total += tl.load(seg_ptr + (lane * SEGMENTS + s) * 2 + 1)
    return total


@triton.jit
def lane_places(key, seg_ptr, lane, SEGMENTS: tl.constexpr):
    """Cache places int64 of a lane's keys `key`, counted over its segments."""
    place = key.to(tl.int64) * 0
    before = 0
    for s in tl.static_range(SEGMENTS):
        seg_start = tl.load(seg_ptr + (lane * SEGMENTS + s) * 2)
        seg_length = tl.load(seg_ptr + (lane * SEGMENTS + s) * 2 + 1)
        here = (key >= before) & (key < before + seg_length)
        place = tl.where(here, (seg_start + key - before).to(tl.int64), place)
        before += seg_length
    return place


@triton.jit
def block_scores(q, keys, scale, SOFTCAP: tl.constexpr):
    """Scores of `q` [M, D] with `keys` [N, D] for `fold_block`; capped where SOFTCAP > 0."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0:
        scores = 1 - 2 / (tl.exp(scores * (2 * scale / SOFTCAP)) + 1)  # tanh
        scores *= SOFTCAP / scale
    return scores


@triton.jit
def fold_block(best, norm, acc, scores, values, scale):
    """Take one block into the running maximum (in powers of two), sum and weighted values."""
    factor = scale * 1.4426950408889634
    peak = tl.maximum(best, tl.max(scores, 1) * factor)
    safe = tl.where(peak > float("-inf"), peak, 0.0)  # a row may have seen no key yet
    # NOTE: spelt out, so that a row has the same bits whether its block was masked or not.
    negative = tl.zeros_like(scores) - safe[:, None]
    weight = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + factor, negative))
    fade = tl.exp2(best - safe)
    norm = norm * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    return peak, norm, acc
