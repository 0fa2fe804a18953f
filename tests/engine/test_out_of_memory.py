"""Injected out-of-memory at every stage: smaller batches, the same answers, the engine lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_bench import Bench, outputs, questions


def failing(function: Callable[..., Any], when: Callable[[int, Any], bool]) -> Callable[..., Any]:
    """`function`, raising out-of-memory in the calls that `when` (number, arguments) picks."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls, args):
            raise torch.OutOfMemoryError("injected")
        return function(*args, **kwargs)

    return wrapped


STAGES = [(s, n) for s in ("vision", "embed", "logits", "decode") for n in (1, 2, 5)]


@pytest.mark.parametrize(("stage", "call"), [s for s in STAGES if s != ("vision", 5)])
def test_answers_survive(folder: Path, stage: str, call: int) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    _inject(engine, stage, lambda n, _: n == call)
    found = bench.run(requests, engine)
    assert outputs(found) == plain
    assert engine.stats.num_out_of_memory == 1


def test_a_row_that_never_fits_fails_alone(folder: Path) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    large = max(i.layout.num_tokens for r in requests for i in r.images)
    _inject(engine, "vision", lambda _, args: any(x.num_tokens == large for x in args[1]))
    found = bench.run(requests, engine)
    failed = {k for k, c in found.items() if c.error is not None}
    expected = {r.key for r in requests if any(i.layout.num_tokens == large for i in r.images)}
    assert failed == expected
    assert all(found[k].output_ids == plain[k] for k in plain if k not in failed)


def test_a_step_that_does_not_fit_is_run_in_parts(folder: Path) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    _inject(engine, "decode", lambda _, args: len(args[0]) > 3)
    found = bench.run(requests, engine)
    assert not [c.error for c in found.values() if c.error]
    assert outputs(found) == plain


def test_a_row_that_no_step_fits_fails_alone(folder: Path) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    bad = requests[2].key
    assert len(plain[bad]) > 1, "it takes part in a step"
    engine = bench.engine()
    _inject(engine, "decode", lambda _, args: any(s.request.key == bad for s in args[0]))
    found = bench.run(requests, engine)
    assert [k for k, c in found.items() if c.error is not None] == [bad]
    assert all(found[k].output_ids == plain[k] for k in plain if k != bad)


def _inject(engine: Any, stage: str, when: Callable[[int, Any], bool]) -> None:
    model = engine.model
    if stage == "vision":
        model.encode_images = failing(model.encode_images, when)
    elif stage == "embed":
        model.embed = failing(model.embed, when)
    elif stage == "logits":
        model.decoder.logits = failing(model.decoder.logits, when)
    else:
        engine.decoder.step = failing(engine.decoder.step, when)
