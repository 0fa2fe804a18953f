"""The names of everything in a run folder: the one file that knows them.

Names are relative to the run folder, with `/`; `storage` reads and writes them. Knows nothing of
what the files hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs.storage import Storage, open_storage

SHARD_PREFIX = "shard-"
PART_SUFFIX = ".parquet"
DEATH_SUFFIX = ".died"


@dataclass(frozen=True)
class RunPaths:
    """A run folder by its address (`output.path`): a local folder or an fsspec address."""

    root: str

    manifest = "manifest.json"
    events = "events.jsonl"
    report = "report.html"
    plan_folder = "plan"
    lease_folder = "leases"
    journals_folder = "journal"
    data_folder = "data"
    redo_folder = "redo"  # which attempt won each redone shard
    slurm_folder = "slurm"  # batch scripts, their logs, and what was submitted
    private_folder = "tmp"  # files not yet visible; an attempt's own

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.root)

    @property
    def is_local(self) -> bool:
        return self.storage.is_local

    def url(self, name: str) -> str:
        """The full address of a name, as fsspec, pyarrow or DuckDB take it."""
        return self.storage.url(name)

    def local(self, name: str) -> Path | None:
        """The file's local path; None on an object store."""
        return Path(self.storage.url(name)) if self.is_local else None

    def plan_part(self, number: int) -> str:
        return f"{self.plan_folder}/part-{number:06d}.jsonl"

    def lease(self, shard: str, turn: int) -> str:
        return f"{self.lease_folder}/{shard}.{turn:06d}.json"

    def journal_folder(self, shard: str) -> str:
        return f"{self.journals_folder}/{shard}"

    def journal(self, shard: str, attempt: str, revision: int = 0, segment: int = 0) -> str:
        """An attempt's journal; one of its segments where files cannot be appended to."""
        return f"{self.journal_folder(shard)}/{attempt}.{revision:04d}.{segment:06d}.journal"

    def death(self, shard: str, attempt: str) -> str:
        """A runner's word that the attempt's process died while the runner lived."""
        return f"{self.journal_folder(shard)}/{attempt}{DEATH_SUFFIX}"

    def part(self, shard: str) -> str:
        return f"{self.data_folder}/{shard}{PART_SUFFIX}"

    def redo(self, shard: str, revision: int) -> str:
        return f"{self.redo_folder}/{shard}.{revision:04d}.json"

    def private(self, shard: str, attempt: str) -> str:
        return f"{self.private_folder}/{shard}.{attempt}{PART_SUFFIX}.tmp"

    @property
    def parts_glob(self) -> str:
        """What a reader of the results globs."""
        return self.url(f"{self.data_folder}/*{PART_SUFFIX}")


def shard_id(number: int) -> str:
    return f"{SHARD_PREFIX}{number:08d}"


def shard_number(shard: str) -> int:
    return int(shard.removeprefix(SHARD_PREFIX))


def journal_revision(name: str) -> int:
    """The shard's revision that a journal's name tells."""
    return int(name.rsplit(".", 3)[1])


def part_shard(name: str) -> str | None:
    """The shard that a file name of `data/` belongs to; None for any other file."""
    stem = name.rsplit("/", 1)[-1]
    if not (stem.startswith(SHARD_PREFIX) and stem.endswith(PART_SUFFIX)):
        return None
    stem = stem.removesuffix(PART_SUFFIX)
    digits = stem.removeprefix(SHARD_PREFIX)
    return stem if digits.isdecimal() and shard_id(int(digits)) == stem else None
