"""Steps that the attention kernels over the cache share: where a key lies, scores of a block, and
the running softmax. Knows no mask.

Keys and values in float8 have a float32 scale a row. Scores and weights are multiplied by it; both
products are in float16, which holds each float8 number, where queries have 16 bits.
"""

from __future__ import annotations

from pipeline.kernels.backend import tl, triton


@triton.jit
def key_places(key, entry):
    """Cache places of the sequence's keys `key`; `entry` is the segment part of a plan's table."""
    shift = tl.where(key < tl.load(entry), tl.load(entry + 2), tl.load(entry + 3))
    return key + tl.where(key < tl.load(entry + 1), shift, tl.load(entry + 4))


@triton.jit
def lane_chunk(
    seg_ptr, lane, split, num_splits, SEGMENTS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """First and end of the keys that a split of a lane reads: whole blocks but for the last.

    The segments [B, S, 2] of a lane hold its keys together; a WINDOW of 0 reads all of them.
    """
    total = 0
    for s in tl.static_range(SEGMENTS):
        total += tl.load(seg_ptr + (lane * SEGMENTS + s) * 2 + 1)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(total - WINDOW, 0)
    chunk = tl.cdiv(tl.cdiv(total - low, num_splits), BLOCK) * BLOCK
    first = low + split * chunk
    return first, tl.minimum(first + chunk, total)


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
def narrow(q):
    """Queries for products with float8 rows, whose type `block_scores` and `fold_block` take."""
    if q.dtype != tl.float32:
        q = q.to(tl.float16)
    return q


@triton.jit
def row_scales(scale_ptr, row, mask, COPIES: tl.constexpr = 2):
    """Scales [N] of the float8 rows `row`, where `mask`.

    NOTE: the compiler lets each thread load what it multiplies where a load has fewer numbers than
    a program has threads, which are 128. COPIES make them as many; it then loads each but once.
    """
    copy = tl.arange(0, COPIES)[None, :] * 0
    scales = tl.load(scale_ptr + row[:, None] + copy, mask=mask[:, None], other=0.0)
    return tl.max(scales, 1)


@triton.jit
def block_scores(q, keys, scale, SOFTCAP: tl.constexpr, scale_ptr=None, row=None, mask=None):
    """Scores of `q` [M, D] with `keys` [N, D] for `fold_block`; capped where SOFTCAP > 0.

    Float8 keys are rows `row` [N], where `mask`, of those that `scale_ptr` has scales of.
    """
    scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
    if scale_ptr is not None:
        scores *= row_scales(scale_ptr, row, mask)[None, :]
    return cap_scores(scores, scale, SOFTCAP)


@triton.jit
def cap_scores(scores, scale, SOFTCAP: tl.constexpr):
    """Scores between -SOFTCAP and SOFTCAP, before `scale`; as they are where SOFTCAP is 0."""
    if SOFTCAP > 0:
        scores = 1 - 2 / (tl.exp(scores * (2 * scale / SOFTCAP)) + 1)  # tanh
        scores *= SOFTCAP / scale
    return scores


@triton.jit
def weigh(best, norm, scores, scale):
    """Running maximum (in powers of two) and sum with one block, its weights, and what fades."""
    factor = scale * 1.4426950408889634
    peak = tl.maximum(best, tl.max(scores, 1) * factor)
    safe = tl.where(peak > float("-inf"), peak, 0.0)  # a row may have seen no key yet
    # NOTE: spelt out, so that a row has the same bits whether its block was masked or not.
    negative = tl.zeros_like(scores) - safe[:, None]
    weight = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + factor, negative))
    fade = tl.exp2(best - safe)
    norm = norm * fade + tl.sum(weight, 1)
    return peak, norm, weight, fade


@triton.jit
def fold_block(best, norm, acc, scores, values, scale, scale_ptr=None, row=None, mask=None):
    """Take one block into the running maximum, sum and weighted values.

    `values` come in the products' type. Float8 rows have scales, as `block_scores` says; their sum
    is `lowered` at the end.
    """
    peak, norm, weight, fade = weigh(best, norm, scores, scale)
    if scale_ptr is not None:
        weight *= lifted(row_scales(scale_ptr, row, mask))[None, :]
    acc = acc * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    return peak, norm, acc


@triton.jit
def lifted(scales):
    """Scales that weights are multiplied by, about as large as their rows' largest values.

    NOTE: scales alone, values by 448, are so small that weights would lose bits in float16.
    """
    return scales * 512.0


@triton.jit
def lowered(acc, scale_ptr):
    """A weighted sum without what `lifted` put in."""
    if scale_ptr is not None:
        acc *= 0.001953125
    return acc
