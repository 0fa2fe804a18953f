"""Where the time went: stages of all workers added up, and the largest loss named."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.report.page import render
from jobs.report.time_spent import time_spent


def end(*workers: dict[str, Any] | None, seconds: float = 10.0) -> dict[str, Any]:
    return {"kind": "end", "seconds": seconds, "workers": list(workers)}


def worker(padding: float = 0.0, **seconds: float) -> dict[str, Any]:
    engine = {
        "num_lane_steps": 100, "num_running_lane_steps": 90, "num_prompt_tokens": 1000,
        "num_cached_tokens": 250, "num_out_of_memory": 1, "slot_occupancy": 0.9,
        "seconds": seconds,
    }  # fmt: skip
    plan = {"rectangle_tokens": 400, "padding_share": padding}
    return {"rows": 5, "labeller": {"engine": engine, "plan": plan}}


def test_workers_and_attempts_are_added_up() -> None:
    first = worker(vision=2.0, prefill=3.0, decode=1.0, feed_wait=0.25, idle=1.25, padding=0.02)
    found = time_spent([
        {"kind": "start", "time": 1.0},
        end(first, worker(vision=1.0, decode=2.0)),
        end(None, {"labeller": {}}, worker(prefill=1.0), seconds=4.0),
    ])  # fmt: skip
    assert found is not None
    assert found["seconds"] == 24.0
    assert found["stages"] == {
        "vision": 3.0, "prefill": 4.0, "decode": 3.0, "feed_wait": 0.25, "idle": 1.0,
    }  # fmt: skip
    assert found["else"] == 24.0 - 11.25
    assert (found["lanes_full"], found["cached_share"]) == (0.9, 0.25)
    assert found["padding_share"] == pytest.approx(0.0067, abs=1e-4)
    assert found["out_of_memory"] == 3
    assert found["largest_loss"]["what"] == "nothing asked of the device"
    assert found["largest_loss"]["seconds"] == 1.0


def test_nothing_is_said_where_no_engine_told_anything() -> None:
    assert time_spent([]) is None
    assert time_spent([{"kind": "end", "code": 1}, end({"labeller": {}})]) is None


def test_an_engine_without_lanes() -> None:
    told = {"labeller": {"engine": {"num_prompt_tokens": 7, "seconds": {"generate": 2.0}}}}
    found = time_spent([end(told)])
    assert found is not None
    assert found["stages"] == {"generate": 2.0}
    assert found["lanes_full"] is found["padding_share"] is None


def test_the_page_names_the_largest_loss() -> None:
    rows = dict.fromkeys(("total", "ok", "failed", "filtered", "left"), 0)
    page = render(
        {
            "status": {"path": "p", "model": "m", "rows": rows, "rows_per_sec": None},
            "time": time_spent([end(worker(prefill=3.0, decode=5.0))]),
            "prompts": {}, "failures": [], "samples": [], "commits": [], "config": {},
            "packages": {},
        }
    )  # fmt: skip
    assert "Largest loss: steps for lanes that stood empty, 0.5 s, 6.2%" in page
    assert "Lanes full 90.0%, padding 0.0%, prompt cached 25.0%." in page
