"""The decode lanes as the device sees them: what a step reads and writes without the host.

A lane that stops is noticed on the device in the same step: it reads nothing and writes to the
trash place from then on, so the host may look a step later. Knows no request beyond the numbers
that `fill` is given, and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.lanes import IDLE, RUNNING, LaneState
from pipeline.kernels.transfer import to_device
from pipeline.rows import SamplingParams

MAX_SEGMENTS = 3  # job prefix, group, own
MAX_STOP_IDS = 16


@dataclass(frozen=True, slots=True)
class LaneStart:
    """What the host tells a lane: where it writes next, what it reads, how it draws."""

    lane: int
    place: int
    position: int
    segments: tuple[tuple[int, int], ...]  # the last is the lane's own, next token included
    sampling: SamplingParams


class Slots(LaneState):
    """State of `num_slots` lanes, one tensor a field, and of a spare one that is always idle."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots + 1, *shape, dtype=dtype, device=device)

        self.num_slots = num_slots
        self.spare = num_slots
        self.device = device
        self.tokens = zeros()
        self.positions = zeros()
        self.places = zeros()
        self.segments = zeros(MAX_SEGMENTS, 2, dtype=torch.int32)
        self.generated = zeros()
        self.limit = zeros()
        self.status = zeros()
        self.seeds = zeros()
        self.top_k = zeros()
        self.stop_ids = zeros(MAX_STOP_IDS) - 1
        self.temperature = zeros(dtype=torch.float32)
        self.top_p = zeros(dtype=torch.float32) + 1
        self.min_p = zeros(dtype=torch.float32)
        self.penalty = zeros(dtype=torch.float32) + 1
        self.seen: Tensor | None = None  # bool [S + 1, V], once a repetition penalty is asked for
        self.allowed: Tensor | None = None  # int32 [S + 1, V/32] bits, once a schema is asked for

    def fill(self, starts: Sequence[LaneStart]) -> Tensor:
        """Write what the host knows of new lanes; returns their numbers int64 [n] on the device."""
        integers, floats = [], []
        for s in starts:
            p = s.sampling
            segments = ((0, 0),) * (MAX_SEGMENTS - len(s.segments)) + s.segments
            stops = () if p.ignore_eos else p.stop_token_ids[:MAX_STOP_IDS]
            integers.append(
                [s.lane, s.place, s.position, p.max_new_tokens, p.seed, p.top_k]
                + [x for segment in segments for x in segment]
                + [*stops, *[-1] * (MAX_STOP_IDS - len(stops))]
            )
            floats.append([p.temperature, p.top_p, p.min_p, p.repetition_penalty])
        table = to_device(torch.tensor(integers, dtype=torch.int64), self.device)
        ratios = to_device(torch.tensor(floats, dtype=torch.float32), self.device)
        lanes = table[:, 0].contiguous()
        columns = (self.places, self.positions, self.limit, self.seeds, self.top_k)
        for number, column in enumerate(columns, 1):
            column[lanes] = table[:, number]
        cut = 6 + 2 * MAX_SEGMENTS
        self.segments[lanes] = table[:, 6:cut].view(-1, MAX_SEGMENTS, 2).int()
        self.stop_ids[lanes] = table[:, cut:]
        for number, column in enumerate((self.temperature, self.top_p, self.min_p, self.penalty)):
            column[lanes] = ratios[:, number]
        # NOTE: `x[lanes] = 0` would copy the number from unpinned memory and wait for the device.
        self.generated.index_fill_(0, lanes, 0)
        self.status.index_fill_(0, lanes, RUNNING)
        return lanes

    def give_back(self, lanes: Sequence[int]) -> None:
        """Idle lanes that the host ended (a stop string, a failed schema)."""
        rows = to_device(torch.tensor(list(lanes), dtype=torch.int64), self.device)
        self.status.index_fill_(0, rows, IDLE)
        for state in (self.places, self.positions, self.segments):
            state.index_fill_(0, rows, 0)
