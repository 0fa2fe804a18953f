"""Finds the row that brings workers down, by what dead attempts have left in their journals.

When attempts at a shard die without a single answer, or again and again, the shard is handed out
in portions, one at a time: rows that no dead attempt was at come first, then the portion that a
death left, cut finer. A row that was alone twice when a worker died, one that had proved itself
with another row and whose runner lived on, is given up with `worker_crash`. Knows no process.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobs.journal import JournalState

NUM_PORTIONS = 16  # a portion is cut into as many: 4096 rows are 3 deaths from a single one
MAX_BARREN = 2  # attempts that may die without an answer before a shard is suspected
MAX_DEATHS = 4  # attempts that may die at all
MAX_ALONE = 2  # deaths of a row on its own that a runner saw
MAX_ALONE_UNSEEN = 5  # and without a witness: it may as well have been a preemption
CRASHED = "worker_crash"
CLEAN_ENDINGS = ("stopped", "hard exit")

Portion = tuple[int, ...]  # row indexes


@dataclass
class Suspicion:
    """How to go on with a shard that workers have died of."""

    crashed: list[int] = field(default_factory=list)  # rows to give up
    portions: list[Portion] = field(default_factory=list)  # the rest, in the order to try
    failed: list[Portion] = field(default_factory=list)  # portions that earlier attempts died at

    def is_dubious(self, portion: Portion) -> bool:
        """Whether a worker has died of these rows: one that tries them must prove itself first."""
        rows = frozenset(portion)
        return any(not rows.isdisjoint(failed) for failed in self.failed)

    def suspects(self) -> frozenset[int]:
        """Rows that no worker may prove itself with."""
        return frozenset(row for failed in self.failed for row in failed)


def suspect(state: JournalState, unanswered: Collection[int]) -> Suspicion | None:
    """None for a shard that is not suspected."""
    died = _deaths(state)
    barren = set(died) - set(state.made_by.values())
    if len(barren) < MAX_BARREN and len(died) < MAX_DEATHS:
        return None
    trials = _failed_trials(state)
    failed = [trial.portion for trial in trials]
    proved = [trial.portion for trial in trials if trial.proved]
    seen = [trial.portion for trial in trials if trial.proved and trial.seen]
    left = sorted(unanswered)
    crashed = [
        row
        for row in left
        if seen.count((row,)) >= MAX_ALONE or proved.count((row,)) >= MAX_ALONE_UNSEEN
    ]
    left = [row for row in left if row not in set(crashed)]
    return Suspicion(crashed, _portions(left, failed), failed)


def _deaths(state: JournalState) -> list[str]:
    """Attempts that had begun to label and did not end of their own will."""
    begun = {attempt for attempt, note in state.notes if "begun" in note}
    clean = _ended_cleanly(state)
    return [attempt for attempt in state.attempts if attempt in begun and attempt not in clean]


def _ended_cleanly(state: JournalState) -> set[str]:
    return {attempt for attempt, note in state.notes if note.get("end") in CLEAN_ENDINGS}


class _Trial(NamedTuple):
    """A portion that an attempt died at."""

    portion: Portion
    proved: bool  # the worker had answered another row before
    seen: bool  # the attempt did not just vanish with its runner


def _failed_trials(state: JournalState) -> list[_Trial]:
    trying: dict[str, tuple[Portion, bool] | None] = {}
    failures = set(state.died)
    for attempt, note in state.notes:
        if "trying" in note:
            trying[attempt] = tuple(note["trying"]), bool(note.get("proved"))
        elif "tried" in note:
            trying[attempt] = None
        elif "end" in note:
            failures.add(attempt)
    clean = _ended_cleanly(state)
    return [
        _Trial(*trial, attempt in failures)
        for attempt, trial in trying.items()
        if trial is not None and attempt not in clean
    ]


def _portions(rows: Sequence[int], failed: Sequence[Portion]) -> list[Portion]:
    smallest: dict[int, Portion | None] = {}
    for row in rows:
        around = [portion for portion in failed if row in portion]
        smallest[row] = min(around, key=len) if around else None
    groups: dict[Portion | None, list[int]] = {}
    for row, portion in smallest.items():
        groups.setdefault(portion, []).append(row)
    order = sorted(groups, key=lambda portion: -len(portion) if portion else -(1 << 60))
    return [cut for portion in order for cut in _cut(groups[portion])]


def _cut(rows: Sequence[int]) -> list[Portion]:
    size = max(1, -(-len(rows) // NUM_PORTIONS))
    return [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]
