"""Drawing tokens with the penalties and cuts of each row, and noise that depends on nothing but
the row's seed, its step and the token's number: the same draw whatever the batch.

The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax of log-probability
plus Gumbel noise. Knows no request.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (the "lowbias32" constants) on int64 values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def gumbel_noise(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Noise float32 [B, N] of (seed, step, token), the same whichever other tokens are asked for.

    `seeds` and `steps` are int64 [B], `tokens` int64 [B, N] or [1, N].
    """
    low, high = seeds & MASK, (seeds >> 32) & MASK
    row = _mix(_mix(_mix(low) ^ high) ^ (steps & MASK))
    bits = _mix(_mix(tokens) ^ row[:, None])
    uniform = (bits.float() + 0.5) * (1.0 / 2**32)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 6e-8)))


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty [B] on the tokens that `seen` [B, V] bool marks (Keskar et al. 2019)."""
    penalty = penalty[:, None]
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def cut(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Put -inf where top-k, top-p or min-p exclude a token; each [B]; k = 0 means off."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    keep = kept(ordered, top_k, top_p, min_p)
    dropped = torch.empty_like(keep).scatter_(1, order, ~keep)
    return logits.masked_fill(dropped, float("-inf"))


def kept(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which of the falling logits [B, N] the cuts leave, bool; N need not be the vocabulary.

    Tokens as likely as the last of the top k stay too, as in transformers.
    """
    last = ordered.gather(1, (top_k[:, None] - 1).clamp(0, ordered.shape[1] - 1))
    keep = (top_k[:, None] <= 0) | (ordered >= last)
    # NOTE: each cut renormalises over what the one before left, as transformers' warpers do.
    ordered = ordered.masked_fill(~keep, float("-inf"))
    probability = ordered.softmax(-1)
    keep &= probability.cumsum(-1) - probability < top_p[:, None]
    ordered = ordered.masked_fill(~keep, float("-inf"))
    probability = ordered.softmax(-1)
    keep &= probability >= min_p[:, None] * probability[:, :1]
    keep[:, 0] = True
    return keep


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, falling, and their tokens; equal ones by number.

    So the order is that of `cut`'s sort, without sorting a vocabulary (150 times as long on a CPU).
    """
    values, tokens = logits.topk(count, dim=-1, sorted=False)
    tokens, by = tokens.sort(dim=-1)
    values, by = values.gather(1, by).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, by)
