"""Damage to what a job stores: which file, what is wrong with it, and what to do.

Knows no format; whoever reads a file finds its damage.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError

RESTORE = "Restore it from a backup, or start a new run folder."


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: str
    problem: str
    advice: str
    shard: str | None = None  # to be done again by a repair


class FileDamaged(UserError):
    """A file without which nothing can go on; the message is for people."""

    def __init__(self, file: str, problem: str, advice: str) -> None:
        super().__init__(f"{file} {problem}: {advice[0].lower()}{advice[1:]}")
        self.finding = Finding(file, problem, advice)
