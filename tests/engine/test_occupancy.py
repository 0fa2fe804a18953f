"""Lanes stay full while work waits, and long answers do not make a run's tail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.planner import Planner
from tests.engine.engine_bench import TEXTS, Bench, ListFeed, picture


def test_lanes_are_refilled(folders: dict[str, Path]) -> None:
    bench = Bench.open(folders["qwen2_5_vl"], decode_slots=16, prefill_tokens=128)
    lengths = np.random.default_rng(0).integers(4, 40, 120)
    requests = [
        bench.request(
            row, TEXTS[0], [picture(row, 56, 56)], max_new_tokens=int(length), ignore_eos=True
        )
        for row, length in enumerate(lengths)
    ]
    engine = bench.engine()
    found = bench.run(requests, engine)
    assert [len(found[r.key].output_ids) for r in requests] == lengths.tolist()
    assert engine.stats.num_output_tokens == lengths.sum()
    full = lengths.sum() / (engine.stats.num_steps * 16)
    assert full > 0.9, full


def test_no_step_is_run_for_lanes_that_have_all_they_asked_for(folders: dict[str, Path]) -> None:
    bench = Bench.open(folders["qwen2_5_vl"], decode_slots=8, prefill_tokens=2048)
    requests = [
        bench.request(row, TEXTS[0], [picture(row, 56, 56)], max_new_tokens=most, ignore_eos=True)
        for row, most in enumerate([5, 5, 5, 1, 3, 5])
    ]
    engine = bench.engine()
    found = bench.run(requests, engine)
    assert [len(found[r.key].output_ids) for r in requests] == [5, 5, 5, 1, 3, 5]
    running = engine.stats.num_running_lane_steps
    assert running == engine.stats.num_output_tokens - len(requests), "a prefill draws the first"
    if engine.stats.num_prefill_batches == 1:
        assert engine.stats.num_steps == 4


class LateFeed(ListFeed):
    """Has the prefix and one group at first, and the others when it is asked again."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__(items)
        self.late = True

    def get(self, timeout: float | None) -> Any:
        if self.late and self.num_released == 2:
            self.late = False
            return None
        return super().get(timeout)


def test_what_came_during_a_batch_goes_before_a_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.open(folders["qwen2_5_vl"], decode_slots=8, prefill_tokens=256)
    requests = [
        bench.request(row, TEXTS[0], [picture(row, 56, 56)], max_new_tokens=4, ignore_eos=True)
        for row in range(8)
    ]
    engine, lanes = bench.engine(), []
    step = engine.decoder.step

    def counted(sequences: Sequence[Any], *rest: Any) -> Any:
        lanes.append(len(sequences))
        return step(sequences, *rest)

    monkeypatch.setattr(engine.decoder, "step", counted)
    items = Planner(bench.settings.engine).plan(requests).items
    found = list(engine.run(LateFeed(items)))
    assert len(found) == 8
    assert engine.stats.num_prefill_batches > 1
    assert lanes == [8] * 3
