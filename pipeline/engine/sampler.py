"""From logits to one token a lane: penalties, schema mask, cuts, draw; only what lanes ask for.

Knows lanes (`slots.py`), no requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.engine.slots import Slots
from pipeline.kernels.backend import next_power_of_2
from pipeline.kernels.lanes import RUNNING
from pipeline.kernels.sampling import cut, gumbel_noise, kept, likeliest, penalise
from pipeline.rows import Request

WHOLE = 1 << 30  # no lane has fewer candidates than the vocabulary
LARGEST_TOP_K = 480  # that is worth taking the candidates first
TIES = 32  # room for tokens as likely as the last of the top k


@dataclass(frozen=True, slots=True)
class SamplerMode:
    """Which parts any of the lanes needs; a CUDA graph is captured for each mode in use.

    `candidates` is how many tokens a draw has to look at: all lanes that draw name a top k.
    """

    penalty: bool = False
    guided: bool = False
    random: bool = False
    cuts: bool = False
    candidates: int = 0

    @classmethod
    def of(cls, requests: Iterable[Request]) -> SamplerMode:
        mode = cls()
        for request in requests:
            p = request.sampling
            random = p.temperature > 0
            mode = cls(
                mode.penalty or p.repetition_penalty != 1.0,
                mode.guided or request.schema is not None,
                mode.random or random,
                mode.cuts or (random and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)),
                max(mode.candidates, _candidates(p.top_k) if random else 0),
            )
        return mode

    def __or__(self, other: SamplerMode) -> SamplerMode:
        return SamplerMode(
            self.penalty or other.penalty,
            self.guided or other.guided,
            self.random or other.random,
            self.cuts or other.cuts,
            max(self.candidates, other.candidates),
        )


def _candidates(top_k: int) -> int:
    return next_power_of_2(top_k + TIES) if 0 < top_k <= LARGEST_TOP_K else WHOLE


GREEDY = SamplerMode()


def sample(logits: Tensor, slots: Slots, rows: Tensor, mode: SamplerMode) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n] of the lanes `rows`, and whether their logits [n, V] were numbers.

    Logits are float32; the model's own type does where the mode is `GREEDY`.
    """
    # NOTE: max propagates NaN, so the chosen logit tells of any.
    chosen, tokens = logits.max(-1)
    valid = torch.isfinite(chosen)
    if mode == GREEDY:
        return tokens, valid
    if mode.penalty:
        assert slots.seen is not None
        logits = penalise(logits, slots.seen[rows], slots.penalty[rows])
    if mode.guided:
        assert slots.allowed is not None
        logits = logits.masked_fill(~unpack(slots.allowed[rows], logits.shape[1]), float("-inf"))
    tokens = logits.argmax(-1)
    if mode.random:
        temperature = slots.temperature[rows]
        cold = temperature <= 0
        warm = logits / torch.where(cold, 1.0, temperature)[:, None]
        tokens = torch.where(cold, tokens, _draw(warm, slots, rows, mode))
    if mode.penalty:
        assert slots.seen is not None
        running = (slots.status[rows] == RUNNING) & valid
        slots.seen[rows, tokens] = slots.seen[rows, tokens] | running
    return tokens, valid


def _draw(logits: Tensor, slots: Slots, rows: Tensor, mode: SamplerMode) -> Tensor:
    """One token of each row by its likelihood: the largest logit with the row's noise added."""
    cuts = slots.top_k[rows], slots.top_p[rows], slots.min_p[rows]
    seeds, steps = slots.seeds[rows], slots.generated[rows]
    if mode.candidates < logits.shape[1]:
        logits, tokens = likeliest(logits, mode.candidates)
        logits = logits.masked_fill(~kept(logits, *cuts), float("-inf"))
        drawn = (logits + gumbel_noise(seeds, steps, tokens)).argmax(-1, keepdim=True)
        return tokens.gather(1, drawn)[:, 0]
    if mode.cuts:
        logits = cut(logits, *cuts)
    tokens = torch.arange(logits.shape[1], device=logits.device)[None]
    return (logits + gumbel_noise(seeds, steps, tokens)).argmax(-1)


def unpack(bits: Tensor, width: int) -> Tensor:
    """int32 [n, ceil(width / 32)], lowest bit first -> bool [n, width]."""
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[:, :, None] >> shift) & 1).bool().flatten(1)[:, :width]
