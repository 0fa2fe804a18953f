"""Where a run's time went: the stages that its workers' engines counted, and the largest loss.

Reads what each attempt that ended wrote to the log of events; an attempt that was killed told
nothing. Knows no row and no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

COMPUTED = {
    "vision": "images through the tower",
    "prefill": "prompts",
    "decode": "answers, token by token",
    "generate": "prompts and answers by transformers",
}
LOST = {
    "feed_wait": "waiting for images",
    "idle": "nothing asked of the device",
    "lanes": "steps for lanes that stood empty",
}


def time_spent(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds by stage over all workers, shares, and `largest_loss`; None where none told any.

    `else` is the time outside the engine: loading the model, planning, committing. An empty lane
    counts as its share of a step's time, which is more than it costs.
    """
    total = 0.0
    seconds, counts = defaultdict[str, float](float), defaultdict[str, float](float)
    for wall, told in _engines(events):
        total += wall
        engine, plan = told["engine"], told.get("plan", {})
        for name, value in engine.get("seconds", {}).items():
            seconds[name] += value
        for name, value in engine.items():
            if name.startswith("num_"):
                counts[name] += value
        rectangles = plan.get("rectangle_tokens", 0)
        counts["rectangles"] += rectangles
        counts["padding"] += rectangles * plan.get("padding_share", 0.0)
    stages = {name: seconds[name] for name in COMPUTED if seconds[name]}
    if not stages:
        return None
    lanes_full = _share(counts["num_running_lane_steps"], counts["num_lane_steps"])
    lost = {
        "feed_wait": seconds["feed_wait"],
        "idle": max(0.0, seconds["idle"] - seconds["feed_wait"]),  # it counts those waits too
        "lanes": seconds["decode"] * (1 - lanes_full) if lanes_full is not None else 0.0,
    }
    stages |= {name: lost[name] for name in ("feed_wait", "idle") if seconds[name]}
    largest = max(lost, key=lambda name: lost[name])
    engine_seconds = sum(stages.values())
    return {
        "seconds": round(max(total, engine_seconds), 3),
        "stages": {name: round(value, 3) for name, value in stages.items()},
        "else": round(max(0.0, total - engine_seconds), 3),
        "lanes_full": lanes_full,
        "padding_share": _share(counts["padding"], counts["rectangles"]),
        "cached_share": _share(counts["num_cached_tokens"], counts["num_prompt_tokens"]),
        "out_of_memory": int(counts["num_out_of_memory"]),
        "largest_loss": {
            "what": LOST[largest],
            "seconds": round(lost[largest], 3),
            "share": round(lost[largest] / engine_seconds, 4),
        },
    }


def _engines(events: Iterable[dict[str, Any]]) -> Iterable[tuple[float, dict[str, Any]]]:
    """Wall seconds and the labeller's counters of each worker that ended."""
    for event in events:
        if event.get("kind") != "end":
            continue
        for worker in event.get("workers") or []:
            told = (worker or {}).get("labeller") or {}
            if "engine" in told:
                yield float(event.get("seconds", 0.0)), told


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
