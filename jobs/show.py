"""Rows of a run folder for a person's eyes: some, the failed ones, one by its id; failure counts.

Reads parts one by one and stops when it has enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.commit import committed_shards
from jobs.manifest import require_manifest
from jobs.part import read_part
from jobs.paths import RunPaths
from jobs.table import FAILED
from pipeline.errors import UserError

NUM_EXAMPLES = 3


@dataclass
class Failures:
    """Failed rows of one error code."""

    code: str
    count: int = 0
    error: str = ""  # the first one's sentence
    row_ids: list[str] = field(default_factory=list)


def open_folder(path: str) -> RunPaths:
    """Raises: UserError when the folder is no run folder."""
    paths = RunPaths(path)
    require_manifest(paths)
    return paths


def tables(paths: RunPaths, columns: list[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
    """Each committed shard with its table, in order. Raises: PartDamaged."""
    for shard in sorted(committed_shards(paths)):
        local = paths.local(paths.part(shard))
        data = local if local is not None else paths.storage.read(paths.part(shard))
        yield shard, read_part(data, columns)


def rows(
    path: str,
    *,
    limit: int | None = 10,
    status: str | None = None,
    code: str | None = None,
    row_id: str | None = None,
    shard: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows that fit, in order, at most `limit`."""
    paths = open_folder(path)
    left = limit
    wanted = {"status": status, "error_code": code, "row_id": row_id}
    if shard is not None and shard not in committed_shards(paths):
        raise UserError(f"{path} has no committed shard {shard!r}.")
    for name, table in tables(paths):
        if shard is not None and name != shard:
            continue
        for column, value in wanted.items():
            if value is not None:
                table = table.filter(pa.compute.equal(table.column(column), value))
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        yield from table.to_pylist()
        if left == 0:
            return


def failures(path: str) -> list[Failures]:
    """Failed rows by code, most frequent first."""
    found: dict[str, Failures] = {}
    counts: Counter[str] = Counter()
    for _, table in tables(open_folder(path), ["row_id", "status", "error_code", "error"]):
        failed = table.filter(pa.compute.equal(table.column("status"), FAILED))
        for row in failed.to_pylist():
            code = row["error_code"]
            counts[code] += 1
            entry = found.setdefault(code, Failures(code, error=row["error"]))
            entry.count = counts[code]
            if len(entry.row_ids) < NUM_EXAMPLES:
                entry.row_ids.append(row["row_id"])
    return [found[code] for code, _ in counts.most_common()]
