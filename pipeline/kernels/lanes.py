"""What one drawn token changes of each lane: its state, its places, its segments.

A lane that stops reads nothing and writes to the trash place (0) from then on. Knows no request and
no model; `engine/slots.py` owns the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import tl, triton, use_triton

IDLE, RUNNING, STOPPED, LENGTH, NUMERICAL = range(5)
BLOCK = 64


class LaneState:
    """Tensors of all lanes that a token changes [S, …], and what they are judged by."""

    tokens: Tensor  # int64 [S], the latest
    positions: Tensor  # int64 [S], of the latest token
    places: Tensor  # int64 [S], where its key and value go
    segments: Tensor  # int32 [S, 3, 2] start and length; the last is the lane's own
    generated: Tensor  # int64 [S]
    status: Tensor  # int64 [S]
    limit: Tensor  # int64 [S]
    stop_ids: Tensor  # int64 [S, K], -1 where there is none


def advance(state: LaneState, rows: Tensor, tokens: Tensor, valid: Tensor, step: int) -> Tensor:
    """Give the lanes `rows` [n] their `tokens` [n]; returns int64 [2, n]: tokens and states.

    `valid` bool [n]: the logits were numbers. `step` is 0 for a first token, which comes from the
    prefill: place and position stand already.
    """
    if use_triton(tokens):
        return _advance_triton(state, rows, tokens, valid, step)
    return advance_reference(state, rows, tokens, valid, step)


def advance_reference(
    state: LaneState, rows: Tensor, tokens: Tensor, valid: Tensor, step: int
) -> Tensor:
    status = state.status[rows]
    running = status == RUNNING
    generated = state.generated[rows] + running
    hit = (tokens[:, None] == state.stop_ids[rows]).any(1)
    judged = torch.where(generated >= state.limit[rows], LENGTH, RUNNING)
    judged = torch.where(hit, STOPPED, judged)
    judged = torch.where(valid, judged, NUMERICAL)
    status = torch.where(running, judged, status)
    still = status == RUNNING
    state.generated[rows] = generated
    state.status[rows] = status
    state.tokens[rows] = torch.where(still, tokens, 0)
    state.positions[rows] = torch.where(still, state.positions[rows] + step, 0)
    state.places[rows] = torch.where(still, state.places[rows] + step, 0)
    segments = state.segments[rows] * still[:, None, None].int()
    segments[:, -1, 1] += still.int() * step
    state.segments[rows] = segments
    return torch.stack([tokens, status])


@triton.jit
def _advance_kernel(
    rows_ptr, tokens_ptr, valid_ptr, last_ptr, positions_ptr, places_ptr, segments_ptr,
    generated_ptr, status_ptr, limit_ptr, stop_ptr, out_ptr, count, step,
    STOPS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
    RUNNING: tl.constexpr, STOPPED: tl.constexpr, LENGTH: tl.constexpr, NUMERICAL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < count
    row = tl.load(rows_ptr + column, mask=inside, other=0)
    token = tl.load(tokens_ptr + column, mask=inside, other=0)
    valid = tl.load(valid_ptr + column, mask=inside, other=0) != 0
    status = tl.load(status_ptr + row, mask=inside, other=0)
    running = status == RUNNING
    generated = tl.load(generated_ptr + row, mask=inside, other=0) + running.to(tl.int64)
    limit = tl.load(limit_ptr + row, mask=inside, other=0)
    judged = tl.where(generated >= limit, LENGTH, RUNNING)
    for number in tl.static_range(STOPS):
        stop = tl.load(stop_ptr + row * STOPS + number, mask=inside, other=-1)
        judged = tl.where(token == stop, STOPPED, judged)
    judged = tl.where(valid, judged, NUMERICAL)
    status = tl.where(running, judged.to(tl.int64), status)
    still = status == RUNNING
    position = tl.load(positions_ptr + row, mask=inside, other=0) + step
    place = tl.load(places_ptr + row, mask=inside, other=0) + step
    tl.store(generated_ptr + row, generated, mask=inside)
    tl.store(status_ptr + row, status, mask=inside)
    tl.store(last_ptr + row, tl.where(still, token, 0), mask=inside)
    tl.store(positions_ptr + row, tl.where(still, position, 0), mask=inside)
    tl.store(places_ptr + row, tl.where(still, place, 0), mask=inside)
    for number in tl.static_range(2 * SEGMENTS):
        cell = segments_ptr + row * 2 * SEGMENTS + number
        value = tl.load(cell, mask=inside, other=0)
        if number == 2 * SEGMENTS - 1:
            value += step
        tl.store(cell, tl.where(still, value, 0), mask=inside)
    tl.store(out_ptr + column, token, mask=inside)
    tl.store(out_ptr + count + column, status, mask=inside)


def _advance_triton(
    state: LaneState, rows: Tensor, tokens: Tensor, valid: Tensor, step: int
) -> Tensor:
    out = torch.empty(2, len(rows), dtype=torch.int64, device=tokens.device)
    # NOTE: a lane that stands in `rows` twice must be idle, or its programs would race.
    _advance_kernel[(triton.cdiv(len(rows), BLOCK),)](
        rows, tokens.contiguous(), valid.contiguous(), state.tokens, state.positions, state.places,
        state.segments, state.generated, state.status, state.limit, state.stop_ids, out, len(rows),
        step, STOPS=state.stop_ids.shape[1], SEGMENTS=state.segments.shape[1], BLOCK=BLOCK,
        RUNNING=RUNNING, STOPPED=STOPPED, LENGTH=LENGTH, NUMERICAL=NUMERICAL,
    )  # fmt: skip
    return out
