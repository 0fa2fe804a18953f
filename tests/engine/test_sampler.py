"""Draws: the cuts are transformers', and a lane draws the same whatever the others ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.engine.sampler import WHOLE, SamplerMode, sample
from pipeline.engine.slots import LaneStart, Slots
from pipeline.kernels.sampling import cut
from pipeline.rows import Request, RequestKey, SamplingParams

VOCAB = 3000


def _logits(rows: int) -> torch.Tensor:
    """As a bfloat16 head gives them: many are equal."""
    torch.manual_seed(rows)
    return (3 * torch.randn(rows, VOCAB)).bfloat16().float()


def _slots(params: list[SamplingParams]) -> tuple[Slots, torch.Tensor]:
    slots = Slots(len(params), torch.device("cpu"))
    starts = [
        LaneStart(lane, place=0, position=0, segments=((0, 1),), sampling=p)
        for lane, p in enumerate(params)
    ]
    return slots, slots.fill(starts)


def _mode(params: list[SamplingParams]) -> SamplerMode:
    none: Any = None
    return SamplerMode.of(
        Request(RequestKey("s", i, "p"), none, (), none, 0, p) for i, p in enumerate(params)
    )


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(1, 1, 0), (50, 1, 0), (64, 0.95, 0),
                                                       (0, 0.8, 0), (200, 0.9, 0.05)])  # fmt: skip
def test_cuts_are_transformers(top_k: int, top_p: float, min_p: float) -> None:
    logits = _logits(4)
    expected = logits
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        expected = warper(None, expected) if warper else expected
    columns = (torch.full((4,), value) for value in (top_k, float(top_p), float(min_p)))
    found = cut(logits, *columns)
    # Equal logits may stand on either side of a nucleus' edge.
    assert torch.equal(found.isinf().sum(1), expected.isinf().sum(1))
    assert torch.equal(found.softmax(-1).sort().values, expected.softmax(-1).sort().values)


def test_few_candidates_draw_what_the_whole_vocabulary_does() -> None:
    cuts: list[dict[str, Any]] = [
        {"top_k": 64}, {"top_k": 64, "top_p": 0.95}, {"top_k": 5, "min_p": 0.1}, {"top_k": 100},
    ]  # fmt: skip
    params = [SamplingParams(temperature=0.8, seed=n, **cuts[n % 4]) for n in range(200)]
    params[7] = SamplingParams()  # greedy among them
    (slots, rows), mode = _slots(params), _mode(params)
    assert 100 < mode.candidates < VOCAB
    few, valid = sample(_logits(200), slots, rows, mode)
    whole = SamplerMode(random=True, cuts=True, candidates=WHOLE)
    assert torch.equal(few, sample(_logits(200), slots, rows, whole)[0])
    assert valid.all()
    assert few[7] == _logits(200)[7].argmax()
    assert len(set(few.tolist())) > 100


@pytest.mark.parametrize("lone", [{}, {"top_p": 0.9}, {"top_k": 2000}])
def test_a_lane_without_a_small_top_k_needs_all(lone: dict[str, Any]) -> None:
    params = [SamplingParams(temperature=1.0, top_k=50), SamplingParams(temperature=1.0, **lone)]
    assert _mode(params[:1]).candidates == 128
    assert _mode(params).candidates == WHOLE
    assert (_mode(params[:1]) | _mode(params[1:])).candidates == WHOLE
    assert _mode([SamplingParams()]).candidates == 0
