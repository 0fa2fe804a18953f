"""Finds the row that brings workers down, by what dead attempts have left in their journals.

When attempts at a shard die without a single answer, the shard is handed out in portions, one at a
time: rows that no dead attempt was at come first, then the portion that a death left, cut finer. A
row that was alone twice when its worker died is given up with `worker_crash`. Knows no process.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from jobs.journal import JournalState

NUM_PORTIONS = 16  # a portion is cut into as many: 4096 rows are 3 deaths from a single one
MAX_BARREN = 2  # attempts that may die without an answer before a shard is suspected
MAX_ALONE = 2  # deaths of a row on its own
CRASHED = "worker_crash"
CLEAN_ENDINGS = ("stopped", "hard exit")

Portion = tuple[int, ...]  # row indexes


@dataclass
class Suspicion:
    """How to go on with a shard that workers have died of."""

    crashed: list[int] = field(default_factory=list)  # rows to give up
    portions: list[Portion] = field(default_factory=list)  # the rest, in the order to try
    failed: list[Portion] = field(default_factory=list)  # portions that earlier attempts died at

    def narrows(self, portion: Portion) -> bool:
        """Whether a death at this portion would tell more than the deaths so far."""
        return self.failed.count(portion) < (MAX_ALONE if len(portion) == 1 else 1)


def suspect(state: JournalState, unanswered: Collection[int]) -> Suspicion | None:
    """None for a shard that is not suspected."""
    if len(_barren(state)) < MAX_BARREN:
        return None
    failed = _failed_portions(state)
    left = sorted(unanswered)
    healthy = _was_healthy(state)
    crashed = [r for r in left if failed.count((r,)) >= MAX_ALONE and healthy]
    left = [row for row in left if row not in set(crashed)]
    return Suspicion(crashed, _portions(left, failed), failed)


def _barren(state: JournalState) -> list[str]:
    """Attempts that had begun to label, answered nothing and did not end of their own will."""
    fruitful = set(state.made_by.values())
    begun = {attempt for attempt, note in state.notes if "begun" in note}
    return [a for a in state.attempts if a in begun - fruitful - _ended_cleanly(state)]


def _ended_cleanly(state: JournalState) -> set[str]:
    return {attempt for attempt, note in state.notes if note.get("end") in CLEAN_ENDINGS}


def _failed_portions(state: JournalState) -> list[Portion]:
    """The portion that each attempt was at when it died."""
    trying: dict[str, Portion | None] = {}
    for attempt, note in state.notes:
        if "trying" in note:
            trying[attempt] = tuple(note["trying"])
        elif "tried" in note:
            trying[attempt] = None
    clean = _ended_cleanly(state)
    return [rows for attempt, rows in trying.items() if rows is not None and attempt not in clean]


def _was_healthy(state: JournalState) -> bool:
    """Whether a row was answered since the last one was given up.

    Otherwise the device may be at fault and not the row: then all would end as crashed.
    """
    last_crash = max(
        (state.made_by[key] for key, a in state.answers.items() if a.error_code == CRASHED),
        default="",
    )
    return any(
        state.made_by[key] >= last_crash
        for key, answer in state.answers.items()
        if answer.error_code is None
    )


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
