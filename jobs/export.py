"""One dataset out of a run folder's parts, read alike by `datasets`, pandas and DuckDB.

`OUT.parquet` and `OUT.jsonl` are one file; any other OUT is a folder with a dataset card and
`data/train-….parquet`. Everything is written beside OUT and renamed when it is whole. Memory is
that of one part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.card import write_card
from jobs.commit import pending_shards
from jobs.manifest import require_manifest
from jobs.paths import RunPaths
from jobs.plan import load_plan
from jobs.show import tables
from jobs.table import STATES
from pipeline.errors import UserError

FILE_BYTES = 256 << 20  # a new file of a folder begins behind as many


@dataclass(frozen=True)
class Selection:
    """Which rows and columns go out."""

    status: str | None = None
    meta: bool = True
    partial: bool = False  # also when shards are missing


class Sink(Protocol):
    """Takes tables of one schema."""

    def write(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def export(path: str, out: str, selection: Selection, *, force: bool = False) -> dict[str, Any]:
    """Write the dataset; returns counts. Raises: UserError."""
    paths = RunPaths(path)
    manifest = require_manifest(paths)
    _check_complete(paths, selection)
    target = Path(out)
    if target.exists() and not force:
        raise UserError(f"{out} exists; give another name or --force.")
    private = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    private.parent.mkdir(parents=True, exist_ok=True)
    states: Counter[str] = Counter()
    num_rows = 0
    schema: pa.Schema | None = None
    try:
        sink = _open_sink(target, private)
        for table in _selected(paths, selection, states):
            schema = table.schema
            sink.write(table)
            num_rows += table.num_rows
        sink.close()
        if schema is None:
            raise UserError(f"{path} has no committed rows to export.")
        if private.is_dir():
            write_card(private / "README.md", manifest, schema, num_rows, states)
        _put_in_place(private, target)
    finally:
        _remove(private)
    told = {state: states[state] for state in STATES}
    return {"out": out, "rows": num_rows, "columns": schema.names, "states": told}


class FileSink:
    """One Parquet file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class LinesSink:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8")

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


class FolderSink:
    """A folder of Parquet files of a handy size, named as `datasets` finds a split."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "data"
        self._folder.mkdir(parents=True)
        self._num_files = 0
        self._num_bytes = 0
        self._file: FileSink | None = None

    def write(self, table: pa.Table) -> None:
        if self._file is None or self._num_bytes >= FILE_BYTES:
            self.close()
            self._file = FileSink(self._folder / f"train-{self._num_files:05d}.parquet")
            self._num_files += 1
            self._num_bytes = 0
        self._file.write(table)
        self._num_bytes += table.nbytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _open_sink(target: Path, private: Path) -> Sink:
    if target.suffix == ".parquet":
        return FileSink(private)
    if target.suffix == ".jsonl":
        return LinesSink(private)
    return FolderSink(private)


def _selected(paths: RunPaths, selection: Selection, states: Counter[str]) -> Iterator[pa.Table]:
    for _, table in tables(paths):
        if selection.status is not None:
            table = table.filter(pa.compute.equal(table.column("status"), selection.status))
        states.update(table.column("status").to_pylist())
        table = table.replace_schema_metadata(None)
        yield table if selection.meta else table.drop_columns(["meta"])


def _check_complete(paths: RunPaths, selection: Selection) -> None:
    plan = load_plan(paths)
    left = sum(shard.num_rows for shard in pending_shards(paths, plan))
    if left and not selection.partial:
        raise UserError(
            f"{paths.root} still lacks {left} of {plan.num_rows} rows: run the job again, or "
            "export what is there with --partial."
        )


def _put_in_place(private: Path, target: Path) -> None:
    """Rename; what was there goes last, so that nothing is lost if this fails."""
    if not target.exists():
        os.rename(private, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.rename(target, old)
    os.rename(private, target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
