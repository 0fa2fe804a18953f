"""Rows of Parquet files, local or at an fsspec address, in bounded memory.

Row groups are read in small batches through a buffered stream, so that a row group of any size
costs no more memory than its largest page and one batch. See substrate notes in this folder's
README for why `pre_buffer` is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RowError, UserError
from pipeline.rows import Row
from pipeline.sources import files
from pipeline.sources.base import InputFile, Source, mark, take_media
from pipeline.sources.cells import records
from pipeline.stores import is_local

_SUFFIXES = (".parquet", ".parq", ".pq")
_TAIL_BYTES = 64 << 10  # read at once in the hope that the footer is in it
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 64
_LOCAL_BUFFER, _REMOTE_BUFFER = 1 << 20, 8 << 20


class ParquetSource(Source):
    """`input.source: parquet`."""

    def schema(self) -> pa.Schema:
        schema = _footer(self.address(self.find_paths()[0])).schema
        return pa.schema([schema.field(name) for name in self.wanted(schema.names)])

    def list_files(self) -> list[InputFile]:
        return files.in_threads(self.describe, self.find_paths())

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        with _open(self.address(path)) as reader:
            if stop > reader.metadata.num_rows:
                raise files.read_error(path, ValueError("it has fewer rows than it had"))
            first = 0
            for group in range(reader.metadata.num_row_groups):
                after = first + reader.metadata.row_group(group).num_rows
                if first < stop and after > start:
                    yield from self._read_group(reader, path, group, first, start, stop)
                first = after

    def begins_as(self, path: str, num_rows: int, digest: str) -> bool:
        address = self.address(path)
        footer = _footer(address)
        if footer.num_rows <= num_rows:
            return False
        with files.open_binary(address) as file:
            end = int(digest.partition("_")[0], 16)
            return digest == _groups_digest(
                address, file, footer.groups, footer.schema, num_rows, end
            )

    def find_paths(self) -> list[str]:
        """The paths of the input, sorted."""
        return sorted(self.addresses) or files.expand(self.settings.path, _SUFFIXES)

    def describe(self, path: str) -> InputFile:
        stamp = files.stamp(self.address(path))
        footer = _footer(self.address(path))
        self.check_columns(footer.schema.names, path)
        return InputFile(path, footer.num_rows, footer.fingerprint, footer.size, stamp)

    def _read_group(
        self, reader: pq.ParquetFile, path: str, group: int, first: int, start: int, stop: int
    ) -> Iterator[Row]:
        """Rows of one row group; what cannot be decoded, even one by one, becomes failed rows."""
        stop = min(stop, first + reader.metadata.row_group(group).num_rows)
        number = max(start, first)
        available = reader.schema_arrow.names
        columns = self.wanted(available)
        media = self.media(available)
        read = [*columns, *media.values()]
        error: Exception | None = None
        for batch_rows in (_batch_rows(reader.metadata.row_group(group)), 1):
            try:
                for record in _records(reader, group, read, batch_rows, number - first):
                    if number >= stop:
                        return
                    cells = take_media(record, media)
                    yield self.make_row(path, start, number, record, **cells)
                    number += 1
                if number >= stop:
                    return
            except (pa.ArrowException, OSError, ValueError) as raised:
                if _is_transient(path, raised):
                    raise files.read_error(path, raised) from raised
                error = raised
        damage = RowError("bad_row", f"Row group {group} of {path} is damaged: {error}.")
        for lost in range(number, stop):
            yield self.make_row(path, start, lost, dict.fromkeys(columns, damage), damage)


class _Footer(NamedTuple):
    """What the end of a file tells."""

    num_rows: int
    groups: tuple[tuple[int, int], ...]  # rows and bytes of each row group
    schema: pa.Schema
    size: int
    fingerprint: str


def _footer(path: str) -> _Footer:
    """Raises: UserError."""
    try:
        size, version = files.size_and_version(path)
        with files.open_binary(path) as file:
            tail = _read_at(file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < length <= size and tail[-4:] == b"PAR1":
                tail = _read_at(file, size - length, length)
            metadata = pq.read_metadata(pa.BufferReader(tail))
            groups, schema = _groups(metadata), metadata.schema.to_arrow_schema()
            if not all(isinstance(name, str) for name in schema.names):
                raise ValueError("its columns have no names")
            digest = _groups_digest(path, file, groups, schema, metadata.num_rows, size - length)
            content = tail[-length:] + (version or "").encode()
        whole = blake2b(content, digest_size=16).hexdigest()
        fingerprint = mark(metadata.num_rows, digest or "", whole)
        return _Footer(metadata.num_rows, groups, schema, size, fingerprint)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no readable Parquet file: {error}.") from error


def _groups(metadata: pq.FileMetaData) -> tuple[tuple[int, int], ...]:
    """Rows and bytes of each row group. Raises: ValueError when they do not add up.

    NOTE: `RowGroupMetaData.column` is not used: on a damaged footer pyarrow ends the process there.
    """
    numbers = map(metadata.row_group, range(metadata.num_row_groups))
    groups = tuple((group.num_rows, group.total_byte_size) for group in numbers)
    if min((rows for rows, _ in groups), default=0) < 0:
        raise ValueError("a row group has less than no rows")
    if sum(rows for rows, _ in groups) != metadata.num_rows:
        raise ValueError("its row groups do not hold the rows that it tells of")
    return groups


def _groups_digest(
    path: str,
    file: Any,
    groups: Sequence[tuple[int, int]],
    schema: pa.Schema,
    num_rows: int,
    end: int,
) -> str | None:
    """The digest of the row groups that hold the first rows; None when rows end inside a group.

    Of a local file it holds samples of the bytes before `end` too; a store tells a version of the
    whole.
    """
    digest, count = blake2b(str(schema).encode(), digest_size=16), 0
    for rows, num_bytes in groups:
        if count >= num_rows:
            break
        count += rows
        digest.update(f"{rows} {num_bytes} ".encode())
    if count != num_rows:
        return None
    if is_local(path):
        digest.update(files.fingerprint(file, end, None).encode())
    return f"{end:x}_{digest.hexdigest()}"


def _read_at(file: Any, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(num_bytes)
    return data


def _open(path: str) -> pq.ParquetFile:
    local = is_local(path)
    try:
        file = path if local else files.open_binary(path)
        buffer = _LOCAL_BUFFER if local else _REMOTE_BUFFER
        reader = pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer)
        _ = reader.schema_arrow, _groups(reader.metadata)
        return reader
    except (pa.ArrowException, OSError, ValueError) as error:
        raise files.read_error(path, error) from error


def _records(
    reader: pq.ParquetFile, group: int, columns: list[str], batch_rows: int, skip: int
) -> Iterator[dict[str, Any]]:
    """The row group's records after the first `skip`, as dictionaries of Python values."""
    if not columns:
        for _ in range(skip, reader.metadata.row_group(group).num_rows):
            yield {}
        return
    for batch in reader.iter_batches(batch_rows, row_groups=[group], columns=columns):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        rest, skip = batch.slice(skip), 0
        yield from records(rest)


def _batch_rows(group: Any) -> int:
    """Rows a batch, by the row group's mean row size."""
    mean = max(1, group.total_byte_size // max(1, group.num_rows))
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // mean))


def _is_transient(path: str, error: Exception) -> bool:
    """Whether another attempt may read what this one could not: the disk or the network failed."""
    if not isinstance(error, OSError):
        return False
    return error.errno is not None or not is_local(path)
