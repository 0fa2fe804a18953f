"""Self-attention inside runs of packed tokens (a vision tower's windows and images).

Runs of one length are taken as one dense rectangle, so that the library's fastest dense kernel
does the work and nothing is padded. Knows no window order and no cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.kernels.backend import invariant, use_triton
from pipeline.kernels.prefill_attention import Run, plan_prefill, prefill_attention

# Values of queries times keys, after which cuDNN's preparation for a shape would have paid:
# it takes 40 ms, and for four images of 3,996 tokens, 16 heads of 80, a call is 0.43 ms quicker.
FAMILIAR = 0.040 / 0.00043 * (4 * 16 * 3996 * 80) * 3996
MOST_SHAPES = 4096  # that are counted at once
WITHOUT_PREPARATION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_work: Counter[tuple[object, ...]] = Counter()


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Runs of one `length`: consecutive tokens from `start`, or those that `index` lists."""

    length: int
    count: int
    start: int
    index: Tensor | None  # int64 [count * length]; None when the runs stand together


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Rectangles that cover `num_tokens` packed tokens, each exactly once."""

    rectangles: tuple[Rectangle, ...]
    num_tokens: int


def plan_attention(lengths: Sequence[int], device: torch.device | str = "cpu") -> AttentionPlan:
    """Plan for packed runs of `lengths` tokens; made on the host, once a batch shape."""
    starts: dict[int, list[int]] = {}
    place = 0
    for length in lengths:
        if length:
            starts.setdefault(length, []).append(place)
        place += length
    rectangles = []
    for length, begins in starts.items():
        together = begins == list(range(begins[0], begins[0] + length * len(begins), length))
        index = None
        if not together:
            first = torch.tensor(begins)[:, None]
            index = (first + torch.arange(length)).flatten().to(device, non_blocking=True)
        rectangles.append(Rectangle(length, len(begins), begins[0], index))
    return AttentionPlan(tuple(rectangles), place)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool = False
) -> Tensor:
    """`q` [T, Hq, D], `k`, `v` [T, Hk, D] -> [T, Hq, D]; tokens see their own run only."""
    if invariant() and not causal and use_triton(q):
        return _invariant_attention(q, k, v, plan, scale)
    if len(plan.rectangles) == 1 and plan.rectangles[0].index is None:
        return _dense(q, k, v, plan.rectangles[0], scale, causal).reshape(q.shape)
    out = torch.empty_like(q)
    for rectangle in plan.rectangles:
        index, stop = rectangle.index, rectangle.start + rectangle.count * rectangle.length
        if index is None:
            part = slice(rectangle.start, stop)
            dense = _dense(q[part], k[part], v[part], rectangle, scale, causal)
            out[part] = dense.reshape(-1, *q.shape[1:])
        else:
            dense = _dense(q[index], k[index], v[index], rectangle, scale, causal)
            out.index_copy_(0, index, dense.reshape(-1, *q.shape[1:]))
    return out


def _dense(
    q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, scale: float, causal: bool
) -> Tensor:
    shape = (rectangle.count, rectangle.length)
    q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))
    return dense_attention(q, k, v, scale, causal).transpose(1, 2)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`q` [B, Hq, Tq, D] over `k`, `v` [B, Hk, Tk, D] -> [B, Hq, Tq, D], by the library.

    `mask` bool [Tq, Tk] tells which keys a query sees.
    """
    familiar = not q.is_cuda or _is_familiar(q, k)
    with nullcontext() if familiar else sdpa_kernel(WITHOUT_PREPARATION):
        return functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _is_familiar(q: Tensor, k: Tensor) -> bool:
    """Whether a shape has brought much work; counts this call.

    NOTE: cuDNN's kernels are a third quicker, but take 40 ms of the host at each new shape.
    Photographs of all sizes bring a new one with nearly every pass.
    """
    shape = (q.shape, k.shape, q.dtype)
    if len(_work) >= MOST_SHAPES and shape not in _work:
        _work.clear()
    _work[shape] += q.numel() * k.shape[2]
    return _work[shape] > FAMILIAR


def _invariant_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Through our own kernel, whose blocks do not depend on how many runs there are."""
    order = [
        torch.arange(r.start, r.start + r.count * r.length, device=q.device)
        if r.index is None
        else r.index
        for r in plan.rectangles
    ]
    runs, start = [], 0
    for rectangle in plan.rectangles:
        for _ in range(rectangle.count):
            whole = (0, rectangle.length)
            runs.append(Run(start, rectangle.length, ((start, rectangle.length),), (whole,)))
            start += rectangle.length
    index = torch.cat(order)
    keys, values = (x[index].transpose(0, 1).contiguous() for x in (k, v))
    found = prefill_attention(q[index], keys, values, plan_prefill(runs, q.device, True), scale)
    return torch.empty_like(found).index_copy_(0, index, found)
