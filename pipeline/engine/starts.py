"""Sets lanes going: what the device must know of them, and their first tokens.

Runs once a sequence, when its prompt is computed. Knows lanes and sequences, no schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.engine.cross_cache import CrossCache
from pipeline.engine.outcome import Outcomes
from pipeline.engine.sampler import SamplerMode, sample
from pipeline.engine.sequence import Sequence
from pipeline.engine.slots import LaneStart, Slots
from pipeline.kernels.lanes import advance
from pipeline.kernels.transfer import to_device


class Starter:
    """Starts sequences on the lanes of `slots`."""

    def __init__(
        self, slots: Slots, outcomes: Outcomes, vocab_size: int, cross: CrossCache | None
    ) -> None:
        self.slots = slots
        self.outcomes = outcomes
        self.vocab_size = vocab_size
        self.cross = cross

    def start(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """Draw from `logits` [n, V]; returns int64 [2, n]: tokens and states."""
        mode = SamplerMode.of(s.request for s in sequences)
        self._prepare(sequences, mode)
        rows = self.slots.fill([_lane_start(s) for s in sequences])
        if self.cross is not None:
            self.cross.start(rows, sequences)
        tokens, valid = sample(logits, self.slots, rows, mode)
        return advance(self.slots, rows, tokens, valid, step=0)

    def _prepare(self, sequences: list[Sequence], mode: SamplerMode) -> None:
        """Lanes' rows of what only some modes keep: tokens seen, tokens allowed."""
        vocab, slots = self.vocab_size, self.slots
        device = slots.device
        if mode.penalty:
            if slots.seen is None:
                shape = (slots.num_slots + 1, vocab)
                slots.seen = torch.zeros(shape, dtype=torch.bool, device=device)
            for s in sequences:
                tokens = torch.from_numpy(s.request.tokens.astype("int64"))
                tokens = tokens[tokens < vocab]  # an image token may lie beyond the head's
                seen = slots.seen[s.lane].fill_(False)
                seen.index_fill_(0, to_device(tokens, device), True)
        elif slots.seen is not None:
            lanes = torch.tensor([s.lane for s in sequences])
            slots.seen.index_fill_(0, to_device(lanes, device), False)
        if mode.guided and slots.allowed is None:
            shape = (slots.num_slots + 1, -(-vocab // 32))
            slots.allowed = torch.full(shape, -1, dtype=torch.int32, device=device)
        if slots.allowed is not None:
            for s in sequences:
                self.outcomes.begin(s)
                mask = self.outcomes.mask(s)
                if mask is None:
                    slots.allowed[s.lane].fill_(-1)
                else:
                    slots.allowed[s.lane] = to_device(mask, device)


def _lane_start(sequence: Sequence) -> LaneStart:
    request, own = sequence.request, sequence.own
    length = sequence.num_own_tokens
    return LaneStart(
        lane=sequence.lane,
        place=own.start + length,
        position=request.next_position,
        segments=(*sequence.segments, (own.start, length + 1)),
        sampling=request.sampling,
    )
