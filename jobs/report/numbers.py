"""Numbers over a run folder's rows: tokens and ends by prompt, failures, samples, commits in time.

Reads part by part; keeps token counts as a histogram, never rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.events import read_events
from jobs.manifest import require_manifest
from jobs.paths import RunPaths
from jobs.report.time_spent import time_spent
from jobs.show import failures, rows, tables
from jobs.status import read_status

NUM_SAMPLES = 12
NUM_POINTS = 120  # of the curve of commits


@dataclass
class PromptNumbers:
    """One prompt's answers."""

    answers: int = 0
    failed: int = 0
    cut: int = 0  # ended at max_new_tokens
    prompt_tokens: int = 0
    cached_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # answers by output tokens

    def percentile(self, share: float) -> int:
        left = share * self.lengths.total()
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left <= 0:
                return length
        return 0

    def as_dict(self) -> dict[str, Any]:
        count = max(1, self.answers)
        return {
            "answers": self.answers,
            "failed": self.failed,
            "cut_share": self.cut / count,
            "prompt_tokens_mean": self.prompt_tokens / count,
            "cached_share": self.cached_tokens / max(1, self.prompt_tokens),
            "output_tokens": sum(length * times for length, times in self.lengths.items()),
            "output_tokens_p50": self.percentile(0.5),
            "output_tokens_p95": self.percentile(0.95),
        }


def collect(path: str) -> dict[str, Any]:
    """Everything that the page shows. Raises: UserError."""
    paths = RunPaths(path)
    manifest = require_manifest(paths)
    events = list(read_events(paths))
    prompts: dict[str, PromptNumbers] = {}
    for _, table in tables(paths, ["meta"]):
        for kind in table.schema.field("meta").type:
            metas = pa.compute.struct_field(table.column("meta"), kind.name)
            _add(prompts.setdefault(kind.name, PromptNumbers()), metas.to_pylist())
    return {
        "status": read_status(path),
        "config": manifest.config,
        "packages": manifest.packages,
        "prompts": {name: numbers.as_dict() for name, numbers in prompts.items()},
        "failures": [vars(failure) for failure in failures(path)],
        "samples": list(rows(path, limit=NUM_SAMPLES)),
        "commits": commits(events),
        "time": time_spent(events),
    }


def commits(events: Iterable[dict[str, Any]]) -> list[tuple[float, int]]:
    """Seconds of work since the first start, rows committed by then; pauses between runs cut out.

    At most `NUM_POINTS` points.
    """
    points: list[tuple[float, int]] = []
    total, worked, last = 0, 0.0, None
    for event in events:
        if event.get("kind") == "start":
            last = event["time"]
        elif event.get("kind") == "commit" and event.get("won") and last is not None:
            worked += max(0.0, event["time"] - last)
            last = event["time"]
            total += event["rows"]
            points.append((round(worked, 2), total))
    step = max(1, -(-len(points) // NUM_POINTS))
    kept = points[step - 1 :: step]
    return kept if not points or kept[-1:] == points[-1:] else [*kept, points[-1]]


def _add(numbers: PromptNumbers, metas: list[dict[str, Any]]) -> None:
    for meta in metas:
        if meta["error_code"] is not None:
            numbers.failed += 1
            continue
        numbers.answers += 1
        numbers.cut += meta["finish_reason"] == "length"
        numbers.prompt_tokens += meta["num_prompt_tokens"]
        numbers.cached_tokens += meta["num_cached_tokens"]
        numbers.lengths[meta["num_output_tokens"]] += 1
