"""A full cache makes work wait and fails nothing; short rows do not starve a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engine.extents import ExtentPool
from pipeline.planner import Planner
from pipeline.rows import Prefix, Request, Turn
from tests.engine.engine_bench import Bench, ListFeed, outputs, picture

SYSTEM = "You are number {}, an assistant who talks a lot about all things in the world."


def _rows(bench: Bench) -> list[Request]:
    """Four system texts of six rows each."""
    return [
        bench.request_of(
            row, [Turn("system", (SYSTEM.format(row // 6),)), Turn("user", (f"Question {row}?",))],
            [], max_new_tokens=8, ignore_eos=True,
        )
        for row in range(24)
    ]  # fmt: skip


@pytest.mark.parametrize("spare", [0, 8, 40, 100])
def test_a_prefix_waits_for_room(folders: dict[str, Path], spare: int) -> None:
    bench = Bench.open(folders["qwen2_5_vl"], decode_slots=4)
    requests = _rows(bench)
    plain = outputs(bench.run(requests))
    planner = Planner(bench.settings.engine)
    items = [i for at in range(0, 24, 6) for i in planner.plan(requests[at : at + 6]).items]
    assert sum(isinstance(i, Prefix) for i in items) == 4
    engine = bench.engine()
    longest = max(r.num_tokens for r in requests) + 8
    pool = engine.scheduler.pool = ExtentPool(1, longest + spare)
    found = {c.key: c for c in engine.run(ListFeed(items))}
    assert not [c.error for c in found.values() if c.error]
    assert outputs(found) == plain
    held = len(engine.scheduler.prefix.prefix.tokens)
    assert pool.num_free == pool.size - held, "only the last prefix stays"


def test_a_long_row_is_not_starved(folders: dict[str, Path]) -> None:
    bench = Bench.open(folders["qwen2_5_vl"], decode_slots=4, prefill_tokens=64)
    pixels = picture(1, 56, 56)
    rows = [bench.request(0, "Hm", [pixels], max_new_tokens=8, ignore_eos=True)]
    rows += [bench.request(n, "Hm", [pixels], max_new_tokens=1) for n in range(1, 120)]
    items = Planner(bench.settings.engine, shares=False).plan(rows).items
    order = [c.key.row for c in bench.engine().run(ListFeed(items))]
    assert order.index(0) < 80, "it would be last"
