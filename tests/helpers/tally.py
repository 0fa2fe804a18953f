"""Counts the faults that crash tests injected and the rows that came through them.

A test tells its tally; `tests/crash/conftest.py` adds them up over all tests and processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.job_folder import JobFolder

NAMES = {"kill": "SIGKILL", "term": "SIGTERM", "int": "SIGINT", "stop": "SIGSTOP",
         "torn": "torn journal tail"}  # fmt: skip


@dataclass
class Tally:
    """What one test did."""

    faults: Counter[str] = field(default_factory=Counter)  # by kind
    rows: Counter[str] = field(default_factory=Counter)  # checked, lost, doubled, changed

    def injected(self, kind: str, count: int = 1) -> None:
        self.faults[kind] += count

    def from_log(self, job: JobFolder) -> int:
        """Count what the job's processes say was injected into them; how many."""
        lines = job.fault_log.read_text().splitlines() if job.fault_log.exists() else []
        job.fault_log.unlink(missing_ok=True)
        actions = [line.split()[0] for line in lines]
        self.faults.update(NAMES.get(a, a.upper()) for a in actions if not a.startswith("sleep"))
        return len(actions)

    def check_rows(self, found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> None:
        """Every wanted row is there, once, as it should be."""
        by_id: dict[str, list[dict[str, Any]]] = {}
        for row in found:
            by_id.setdefault(row["row_id"], []).append(row)
        self.rows["checked"] += len(wanted)
        for row in wanted:
            copies = by_id.get(row["row_id"], [])
            self.rows["lost"] += not copies
            self.rows["doubled"] += len(copies) > 1
            self.rows["changed"] += bool(copies) and copies[0] != row
        assert list(found) == list(wanted)
