"""One dataset out of a run folder's parts, read alike by `datasets`, pandas and DuckDB.

`OUT.parquet` and `OUT.jsonl` are one file; any other OUT is a folder with a dataset card and
`data/train-….parquet`, or a dataset of the hub. Here everything is written beside OUT and renamed
when it is whole; what goes elsewhere is first written to a temporary folder. Memory is that of one
part, and of one part of every run folder that is joined.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.card import write_card
from jobs.commit import pending_shards
from jobs.hub_push import HubPush, HubTarget
from jobs.join import Joined
from jobs.manifest import require_manifest
from jobs.paths import RunPaths
from jobs.plan import Plan, load_plan
from jobs.show import tables
from jobs.storage import open_storage
from jobs.table import STATES
from pipeline.errors import UserError

FILE_BYTES = 256 << 20  # a new file of a folder begins behind as many

_OTHER_FORMATS = frozenset(
    {".csv", ".tsv", ".json", ".ndjson", ".arrow", ".feather", ".xlsx", ".txt", ".tar", ".gz"}
)


@dataclass(frozen=True)
class Selection:
    """Which rows and columns go out."""

    status: str | None = None
    meta: bool = True
    partial: bool = False  # also when shards are missing
    joins: tuple[str, ...] = ()  # run folders whose answers stand beside, as PATH or NAME=PATH


class Sink(Protocol):
    """Takes tables of one schema."""

    def write(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def export(
    path: str, out: str, selection: Selection, *, force: bool = False, private: bool = False
) -> dict[str, Any]:
    """Write the dataset; returns counts. `private` is for a new repository of the hub.

    Raises: UserError.
    """
    suffix = Path(out).suffix.lower()
    if suffix in _OTHER_FORMATS and not out.startswith("hf://"):
        raise UserError(
            f"{out}: export writes OUT.parquet, OUT.jsonl or a folder, no {suffix} file."
        )
    if "://" not in out or out.startswith("file://"):
        return _export_here(path, out.removeprefix("file://"), selection, force=force)
    if out.startswith("hf://"):
        return _export_to_hub(path, out, selection, force=force, private=private)
    return _export_to_store(path, out, selection, force=force)


def _export_here(path: str, out: str, selection: Selection, *, force: bool) -> dict[str, Any]:
    target = Path(out)
    if target.exists() and not force:
        raise UserError(f"{out} exists; give another name or --force.")
    private = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    private.parent.mkdir(parents=True, exist_ok=True)
    try:
        told = _write(RunPaths(path), selection, private, target.suffix)
        _put_in_place(private, target)
    finally:
        _remove(private)
    return {"out": out, **told}


def _export_to_hub(
    path: str, out: str, selection: Selection, *, force: bool, private: bool
) -> dict[str, Any]:
    push = HubPush(HubTarget.parse(out))
    if not force:
        push.check_free()
    with tempfile.TemporaryDirectory(prefix="vlm-batch-export-") as folder:
        told = _write(RunPaths(path), selection, Path(folder), "")
        message = f"{told['rows']} rows answered with vlm-batch"
        told["commit"] = push.push(Path(folder), message, private=private)
    return {"out": out, **told}


def _export_to_store(path: str, out: str, selection: Selection, *, force: bool) -> dict[str, Any]:
    """To an object store: the data first, the card last."""
    parent, _, name = out.rstrip("/").rpartition("/")
    store = open_storage(parent)
    there = store.exists(name) or bool(store.names(f"{name}/data"))
    if there and not force:
        raise UserError(f"{out} exists; give another name or --force.")
    with tempfile.TemporaryDirectory(prefix="vlm-batch-export-") as folder:
        private = Path(folder, name)
        told = _write(RunPaths(path), selection, private, private.suffix)
        files = sorted(f for f in private.rglob("*") if f.is_file()) or [private]
        names = [f.relative_to(folder).as_posix() for f in files]
        for file, target in sorted(zip(files, names, strict=True), key=lambda pair: -len(pair[1])):
            store.publish_replace(file, target)
        for stale in {f"{name}/data/{n}" for n in store.names(f"{name}/data")} - set(names):
            store.delete(stale)
    return {"out": out, **told}


def _write(paths: RunPaths, selection: Selection, private: Path, suffix: str) -> dict[str, Any]:
    """Write the whole dataset under a private name; returns counts. Raises: UserError."""
    manifest = require_manifest(paths)
    plan = load_plan(paths)
    _check_complete(paths, plan, selection)
    joined = [Joined(a, meta=selection.meta, partial=selection.partial) for a in selection.joins]
    states: Counter[str] = Counter()
    num_rows = 0
    schema: pa.Schema | None = None
    sink = _open_sink(private, suffix)
    try:
        for table in _selected(paths, plan, selection, joined, states):
            schema = table.schema
            sink.write(table)
            num_rows += table.num_rows
    finally:
        sink.close()
    if schema is None:
        raise UserError(f"{paths.root} has no committed rows to export.")
    if private.is_dir():
        write_card(private / "README.md", manifest, schema, num_rows, states, joined)
    told = {state: states[state] for state in STATES}
    return {"rows": num_rows, "columns": schema.names, "states": told}


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
            self._file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> str:
    """What JSON has no form for: bytes as base64, the rest as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


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


def _open_sink(private: Path, suffix: str) -> Sink:
    if suffix == ".parquet":
        return FileSink(private)
    if suffix == ".jsonl":
        return LinesSink(private)
    return FolderSink(private)


def _selected(
    paths: RunPaths,
    plan: Plan,
    selection: Selection,
    joined: list[Joined],
    states: Counter[str],
) -> Iterator[pa.Table]:
    for shard, table in tables(paths):
        table = table.replace_schema_metadata(None)
        if not selection.meta:
            table = table.drop_columns(["meta"])
        for other in joined:
            names = other.names(table.schema.names)
            answers = other.answers(plan.shard(shard), table.column("row_id"))
            for own, name in names.items():
                table = table.append_column(name, answers.column(own))
        if selection.status is not None:
            table = table.filter(pa.compute.equal(table.column("status"), selection.status))
        states.update(table.column("status").to_pylist())
        yield table


def _check_complete(paths: RunPaths, plan: Plan, selection: Selection) -> None:
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
