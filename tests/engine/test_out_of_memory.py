"""Injected out-of-memory at every stage: smaller batches, the same answers, the engine lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_bench import PIXELS, Bench, outputs, picture, questions


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


CALLS = {"upload": 5, "vision": 2, "embed": 5, "logits": 5, "start": 2, "decode": 5}
STAGES = [(stage, call) for stage, most in CALLS.items() for call in (1, 2, 5) if call <= most]


@pytest.mark.parametrize(("stage", "call"), STAGES)
def test_answers_survive(folder: Path, stage: str, call: int) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    _inject(engine, stage, lambda n, _: n == call)
    found = bench.run(requests, engine)
    assert outputs(found) == plain
    assert engine.stats.num_out_of_memory == 1


@pytest.mark.parametrize("stage", ["upload", "vision"])
def test_a_row_that_never_fits_fails_alone(folder: Path, stage: str) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    large = max(i.layout.num_tokens for r in requests for i in r.images)
    expected = {r.key for r in requests if any(i.layout.num_tokens == large for i in r.images)}
    shapes = {PIXELS[i.image.digest].shape for r in requests if r.key in expected for i in r.images}
    too_large = {
        "upload": lambda _, args: any(x.shape in shapes for x in args[0]),
        "vision": lambda _, args: any(x.num_tokens == large for x in args[1]),
    }
    _inject(engine, stage, too_large[stage])
    found = bench.run(requests, engine)
    codes = {k: c.error.code for k, c in found.items() if c.error is not None}
    assert codes == dict.fromkeys(expected, "out_of_memory")
    assert all(found[k].output_ids == plain[k] for k in plain if k not in codes)


def test_waiting_images_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.open(folder, decode_slots=1, prefill_tokens=2048)
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    engine = bench.engine()
    largest = max(PIXELS[i.image.digest].nbytes for r in requests for i in r.images)
    monkeypatch.setattr("pipeline.engine.engine.MOST_PIXEL_BYTES", largest)
    add, held = engine.scheduler.add_group, []

    def seen(*given: Any) -> None:
        add(*given)
        held.append(engine.scheduler.num_waiting_bytes)

    engine.scheduler.add_group = seen
    assert outputs(bench.run(requests, engine)) == plain
    assert largest <= max(held) < 3 * largest
    assert engine.scheduler.num_waiting_bytes == 0


def test_large_images_do_not_wait_for_running_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may wait is too little for a batch's tokens; lanes are filled all the same."""
    bench = Bench.open(folder, decode_slots=8, prefill_tokens=4096)
    requests = [
        bench.request(row, "Hm", [picture(row, 56, 56)], max_new_tokens=8, ignore_eos=True)
        for row in range(16)
    ]
    monkeypatch.setattr("pipeline.engine.engine.MOST_PIXEL_BYTES", 1)
    engine = bench.engine()
    bench.run(requests, engine)
    assert engine.stats.num_steps < 16 * 7 / 3, "rows ran one after another"


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
    if stage == "upload":
        engine.uploader.upload = failing(engine.uploader.upload, when)
    elif stage == "start":
        engine.starter.start = failing(engine.starter.start, when)
    elif stage == "vision":
        model.encode_images = failing(model.encode_images, when)
    elif stage == "embed":
        model.embed = failing(model.embed, when)
    elif stage == "logits":
        model.decoder.logits = failing(model.decoder.logits, when)
    else:
        engine.decoder.step = failing(engine.decoder.step, when)
