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


def gumbel_noise(seeds: Tensor, steps: Tensor, width: int) -> Tensor:
    """Noise [B, width] float32 of (seed, step, token); `seeds`, `steps` int64 [B]."""
    low, high = seeds & MASK, (seeds >> 32) & MASK
    row = _mix(_mix(_mix(low) ^ high) ^ (steps & MASK))
    token = torch.arange(width, device=seeds.device)
    bits = _mix(_mix(token)[None, :] ^ row[:, None])
    uniform = (bits.float() + 0.5) * (1.0 / 2**32)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 6e-8)))


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty [B] on the tokens that `seen` [B, V] bool marks (Keskar et al. 2019)."""
    penalty = penalty[:, None]
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def cut(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Put -inf where top-k, top-p or min-p exclude a token; each [B]; k = 0 means off."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    keep = (top_k[:, None] <= 0) | (rank < top_k[:, None])
    # NOTE: each cut renormalises over what the one before left, as transformers' warpers do.
    ordered = ordered.masked_fill(~keep, float("-inf"))
    probability = ordered.softmax(-1)
    keep &= probability.cumsum(-1) - probability < top_p[:, None]
    ordered = ordered.masked_fill(~keep, float("-inf"))
    probability = ordered.softmax(-1)
    keep &= probability >= min_p[:, None] * probability[:, :1]
    keep[:, 0] = True
    dropped = torch.empty_like(keep).scatter_(1, order, ~keep)
    return logits.masked_fill(dropped, float("-inf"))
