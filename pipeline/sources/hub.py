"""Rows of datasets on the Hugging Face hub or in a local folder, as `datasets` finds them.

A dataset of Parquet or tar files is read by our own readers at its hub addresses: that streams,
and any range of rows costs one row group. Other formats go through `datasets`, streamed or
downloaded first. Pictures are never decoded here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.rows import Row
from pipeline.settings import InputSettings
from pipeline.sources import files
from pipeline.sources.base import InputFile, Source, take_media
from pipeline.sources.cells import records
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.webdataset import WebDatasetSource
from pipeline.stores import patiently

_REVISION = re.compile(r"^(hf://[^@]*)@[^/]+")  # the commit in an address
_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?")
_BATCH_ROWS = 32
_COUNT_ROWS = 1000


class HubSource(Source):
    """`input.source: hf`: chooses the reader that suits the dataset's files."""

    @cached_property
    def _reader(self) -> Source:
        return _choose(self.settings, self._asked)

    def schema(self) -> pa.Schema:
        return self._reader.schema()

    def list_files(self) -> list[InputFile]:
        return self._reader.list_files()

    def describe(self, path: str) -> InputFile:
        return self._reader.describe(path)

    def stamp(self, path: str) -> str:
        return self._reader.stamp(path)

    def begins_as(self, path: str, num_rows: int, digest: str) -> bool:
        return self._reader.begins_as(path, num_rows, digest)

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        return self._reader.read_rows(path, start, stop)


class _Loaded(Source):
    """A dataset in Arrow files on this machine: one input file."""

    def __init__(
        self, settings: InputSettings, columns: Collection[str] | None, dataset: Any, mark: str
    ) -> None:
        super().__init__(settings, columns)
        self._dataset = dataset.with_format("arrow")
        self._mark = mark

    def schema(self) -> pa.Schema:
        schema = self._dataset.features.arrow_schema
        return pa.schema([schema.field(name) for name in self.wanted(schema.names)])

    def list_files(self) -> list[InputFile]:
        path = _label(self.settings)
        self.check_columns(self._dataset.column_names, path)
        num_bytes = self._dataset.data.nbytes if len(self._dataset) else 0
        return [InputFile(path, len(self._dataset), self._mark, num_bytes)]

    def stamp(self, path: str) -> str:
        return ""  # `datasets` has fixed what is read

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        if stop > len(self._dataset):
            raise files.read_error(path, ValueError("it has fewer rows than it had"))
        media, columns = _columns(self, self._dataset.column_names)
        chosen = self._dataset.select_columns(columns)
        for first in range(start, stop, _BATCH_ROWS):
            table = chosen[first : min(stop, first + _BATCH_ROWS)]
            for number, record in enumerate(records(table.combine_chunks()), first):
                cells = take_media(record, media)
                yield self.make_row(path, start, number, record, **cells)


class _Streamed(Source):
    """A dataset that `datasets` streams: an input file a shard. Counting rows reads them all."""

    def __init__(
        self, settings: InputSettings, columns: Collection[str] | None, dataset: Any, mark: str
    ) -> None:
        super().__init__(settings, columns)
        self._dataset = dataset.with_format("arrow")
        self._mark = mark

    def schema(self) -> pa.Schema:
        schema = self._first_table().schema
        return pa.schema([schema.field(name) for name in self.wanted(schema.names)])

    def list_files(self) -> list[InputFile]:
        self.check_columns(self._first_table().column_names, _label(self.settings))
        found = []
        for index in range(self._dataset.num_shards):
            count = sum(table.num_rows for table in self._shard(index).iter(_COUNT_ROWS))
            found.append(InputFile(f"{_label(self.settings)}/{index:05}", count, self._mark, 0))
        return found

    def stamp(self, path: str) -> str:
        return ""  # `datasets` has fixed what is read

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        shard = self._shard(int(path.rpartition("/")[2]))
        number = start
        for table in shard.skip(start).take(stop - start).iter(_BATCH_ROWS):
            media, columns = _columns(self, table.column_names)
            for record in records(table.select(columns)):
                cells = take_media(record, media)
                yield self.make_row(path, start, number, record, **cells)
                number += 1
        if number < stop:
            raise files.read_error(path, ValueError("it has fewer rows than it had"))

    def _shard(self, index: int) -> Any:
        return self._dataset.shard(num_shards=self._dataset.num_shards, index=index)

    def _first_table(self) -> Any:
        for table in self._dataset.iter(1):
            return table
        raise UserError(f"the dataset {self.settings.path} has no rows.")


def _choose(settings: InputSettings, columns: Collection[str] | None) -> Source:
    settings = _of_address(settings)
    assert isinstance(settings.path, str)
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"input.source hf needs the package `datasets`: {error}.") from error
    try:
        if _is_saved(settings.path):
            return _from_disk(settings, columns, datasets)
        builder = patiently(
            lambda: datasets.load_dataset_builder(
                settings.path, settings.name, revision=settings.revision
            )
        )
        addresses = _addresses(builder, settings)
        if settings.streaming:
            for suffix, reader in ((".parquet", ParquetSource), (".tar", WebDatasetSource)):
                if addresses and all(address.endswith(suffix) for address in addresses):
                    source = reader(settings, columns)
                    source.addresses = {_stable(address): address for address in addresses}
                    return source
        kind = _Streamed if settings.streaming else _Loaded
        dataset = patiently(
            lambda: datasets.load_dataset(
                settings.path,
                settings.name,
                split=settings.split,
                revision=settings.revision,
                streaming=settings.streaming,
            )
        )
        return kind(settings, columns, dataset, _mark(builder, addresses))
    except UserError:
        raise
    except Exception as error:  # `datasets` and the hub raise classes of many packages
        text = " ".join(str(error).split())
        raise UserError(f"the dataset {settings.path} cannot be opened: {text}") from error


def _of_address(settings: InputSettings) -> InputSettings:
    """`hf://datasets/OWNER/NAME@REVISION` as the dataset's id and revision. Raises: UserError."""
    if not isinstance(settings.path, str):
        raise UserError("input.path must be one dataset where input.source is hf.")
    if not settings.path.startswith("hf://"):
        return settings
    match = _ADDRESS.fullmatch(settings.path)
    if match is None:
        raise UserError(
            f"input.path {settings.path} names no dataset: write OWNER/NAME or "
            "hf://datasets/OWNER/NAME, or read single files with input.source parquet."
        )
    revision = match[2] or settings.revision
    return settings.model_copy(update={"path": match[1], "revision": revision})


def _addresses(builder: Any, settings: InputSettings) -> list[str]:
    """The split's files; none when the dataset is not made of files."""
    found = builder.config.data_files
    if not found:
        return []
    split = re.split(r"\[", settings.split)[0]  # train[:100] is for `datasets` to cut
    if split not in found:
        known = ", ".join(sorted(map(str, found)))
        raise UserError(f"input.split {split!r} is not in {settings.path}; it has {known}.")
    return [] if "[" in settings.split else [str(address) for address in found[split]]


def _is_saved(path: str) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    marks = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(os.path.join(path, mark)) for mark in marks)


def _from_disk(settings: InputSettings, columns: Collection[str] | None, datasets: Any) -> Source:
    dataset = datasets.load_from_disk(settings.path)
    if isinstance(dataset, datasets.DatasetDict):
        if settings.split not in dataset:
            known = ", ".join(sorted(dataset))
            raise UserError(
                f"input.split {settings.split!r} is not in {settings.path}; it has {known}."
            )
        dataset = dataset[settings.split]
    return _Loaded(settings, columns, dataset, str(dataset._fingerprint))


def _mark(builder: Any, addresses: Sequence[str]) -> str:
    """The fingerprint of files by their content, or of the builder where there are none."""
    digest = blake2b(digest_size=16)
    for address in addresses or ():
        size, version = files.size_and_version(address)
        with files.open_binary(address) as file:
            digest.update(files.fingerprint(file, size, version, address.encode()).encode())
    if not addresses:
        digest.update(f"{builder.hash} {builder.config.data_files}".encode())
    return digest.hexdigest()


def _stable(address: str) -> str:
    """The address without its commit, since a new commit does not change this file's rows."""
    return _REVISION.sub(r"\1", address)


def _label(settings: InputSettings) -> str:
    return f"{str(settings.path).rstrip('/')}/{settings.name or 'default'}/{settings.split}"


def _columns(source: Source, available: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(columns of images and videos by kind, all columns to read)."""
    media = source.media(available)
    return media, [*source.wanted(available), *media.values()]
