"""From a mixture's router logits to each token's experts and their weights.

On a GPU one kernel; choices within groups of experts are plain torch everywhere. Knows no expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton

TOKENS = 16  # of one program
TINY = 1e-20


def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    top: int,
    sigmoid: bool = False,
    normalised: bool = False,
    scaling: float = 1.0,
    groups: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """`logits` float32 [T, E] -> experts int32 [T, K] and weights float32 [T, K].

    Scores are the logits' softmax or sigmoid. Experts rank by score and `bias` [E], and weigh by
    score alone; `groups` are how many there are and from how many a token may choose.
    """
    if use_triton(logits) and groups[0] == 1:
        return _choose_triton(logits, bias, top, sigmoid, normalised, scaling)
    return choose_experts_reference(logits, bias, top, sigmoid, normalised, scaling, groups)


def choose_experts_reference(
    logits: Tensor,
    bias: Tensor | None,
    top: int,
    sigmoid: bool = False,
    normalised: bool = False,
    scaling: float = 1.0,
    groups: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ranks = scores if bias is None else scores + bias
    if groups[0] > 1:
        ranks = _within_groups(ranks, *groups, by_two=bias is not None)
    chosen = ranks.topk(top, dim=-1).indices
    weights = scores.gather(1, chosen)
    if normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return chosen.int(), weights * scaling


def _within_groups(ranks: Tensor, num_groups: int, top_groups: int, by_two: bool) -> Tensor:
    """`ranks` without the groups that are not among a token's best.

    A group ranks by its best expert, or by its best two together.
    """
    groups = ranks.view(len(ranks), num_groups, -1)
    best = groups.topk(2, dim=-1).values.sum(-1) if by_two else groups.amax(-1)
    chosen = best.topk(top_groups, dim=-1).indices
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).view(ranks.shape)


@triton.jit
def _choose_kernel(
    logits_ptr, bias_ptr, chosen_ptr, weights_ptr, tokens, scaling,
    EXPERTS: tl.constexpr, TOP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    NORMALISED: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, slot = tl.arange(0, BINS), tl.arange(0, SLOTS)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    at = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        peak = tl.max(tl.where(inside, logits, -1e30), 1)
        scores = tl.exp(tl.where(inside, logits, -1e30) - peak[:, None])
        scores = tl.where(inside, scores, 0.0)
        scores = scores / tl.maximum(tl.sum(scores, 1), 1e-30)[:, None]
    ranks = scores
    if BIASED:
        ranks += tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0)[None, :]
    ranks = tl.where((expert < EXPERTS)[None, :], ranks, float("-inf"))
    chosen = tl.zeros([ROWS, SLOTS], tl.int32)
    weights = tl.zeros([ROWS, SLOTS], tl.float32)
    for k in tl.static_range(TOP):
        best = tl.argmax(ranks, 1)
        hit = expert[None, :] == best[:, None]
        score = tl.sum(tl.where(hit, scores, 0.0), 1)
        here = (slot == k)[None, :]
        chosen = tl.where(here, best[:, None], chosen)
        weights = tl.where(here, score[:, None], weights)
        ranks = tl.where(hit, float("-inf"), ranks)
    if NORMALISED:
        weights = weights / (tl.sum(weights, 1) + TINY)[:, None]
    out = token.to(tl.int64)[:, None] * TOP + slot[None, :]
    mask = (token < tokens)[:, None] & (slot < TOP)[None, :]
    tl.store(chosen_ptr + out, chosen, mask=mask)
    tl.store(weights_ptr + out, weights * scaling, mask=mask)


def _choose_triton(
    logits: Tensor, bias: Tensor | None, top: int, sigmoid: bool, normalised: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, top, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    if tokens:
        _choose_kernel[(triton.cdiv(tokens, TOKENS),)](
            logits.contiguous(), bias, chosen, weights, tokens, scaling, EXPERTS=experts, TOP=top,
            SIGMOID=sigmoid, BIASED=bias is not None, NORMALISED=normalised, TINY=TINY,
            ROWS=TOKENS, BINS=next_power_of_2(experts), SLOTS=next_power_of_2(top), num_warps=4,
        )  # fmt: skip
    return chosen, weights
