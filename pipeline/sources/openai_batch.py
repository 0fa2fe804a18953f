"""Rows of JSON-lines files of chat requests, such as OpenAI's batch files.

A line is `{"custom_id": …, "body": {"messages": […]}}` or `{"messages": […]}`; its other keys
become columns. The sampling keys of a request are not obeyed: a job has one `generation`. Knows
nothing of what the messages mean.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from array import array
from collections.abc import Collection, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.rows import Row
from pipeline.settings import InputSettings
from pipeline.sources import files
from pipeline.sources.base import InputFile, Source, mark

MAX_LINE_BYTES = 256 << 20
_DEFAULT_ID = "custom_id"
_PLACE_LINES = 1000


class OpenAIBatchSource(Source):
    """`input.source: openai`."""

    def __init__(self, settings: InputSettings, columns: Collection[str] | None = None) -> None:
        super().__init__(settings, columns)
        self._places: dict[str, array[int]] = {}  # by path: where every thousandth line begins

    def schema(self) -> pa.Schema:
        record = self._first_record()
        fields = [(name, files.arrow_type(record[name])) for name in self.wanted(list(record))]
        return pa.schema(fields)

    def list_files(self) -> list[InputFile]:
        paths = files.expand(self.settings.path, (".jsonl", ".jsonl.gz", ".ndjson"))
        return files.in_threads(self.describe, paths)

    def describe(self, path: str) -> InputFile:
        """Counts the lines; as all are read, the whole content is the fingerprint."""
        try:
            stamp = files.stamp(path)
            self._places[path] = places = array("q")
            digest, count = _digest(path, places=places)
            size, _ = files.size_and_version(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        return InputFile(path, count, mark(count, digest, ""), size, stamp)

    def beginning(self, path: str, num_rows: int) -> str | None:
        digest, count = _digest(path, num_rows)
        return digest if count > num_rows else None

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        places = self._places.get(path) or (0,)
        known = min(start // _PLACE_LINES, len(places) - 1)
        first = known * _PLACE_LINES
        number = first - 1
        try:
            for number, (_, line) in enumerate(_lines(path, places[known]), first):
                if number >= stop:
                    return
                if number >= start:
                    yield self._row(path, start, number, line)
        except OSError as error:
            raise files.read_error(path, error) from error
        if number + 1 < stop:
            raise files.read_error(path, ValueError("it has fewer lines than it had"))

    def _row(self, path: str, start: int, number: int, line: bytes) -> Row:
        try:
            record = _record(line)
        except RowError as error:
            return self.make_row(path, start, number, {}, error)
        kept = {name: record[name] for name in self.wanted(list(record))}
        cells = {kind: record.get(name) for kind, name in self.media(record).items()}
        row = self.make_row(path, start, number, kept, **cells)
        messages = record.get(self.settings.messages or "messages")
        own = record.get(_DEFAULT_ID) if self.settings.id is None else None
        return replace(row, messages=messages, row_id=own if isinstance(own, str) else row.row_id)

    def _first_record(self) -> dict[str, Any]:
        for path in files.expand(self.settings.path, (".jsonl", ".jsonl.gz", ".ndjson")):
            try:
                for _, line in _lines(path):
                    with contextlib.suppress(RowError):
                        return _record(line)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error}.") from error
        return {}


def _record(line: bytes) -> dict[str, Any]:
    """The line's keys, with those of its `body` beside them."""
    if len(line) > MAX_LINE_BYTES:
        raise RowError("bad_row", f"The line has more than {MAX_LINE_BYTES} bytes.")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError("bad_row", f"The line is no JSON: {error}.") from None
    if not isinstance(record, dict):
        raise RowError("bad_row", "The line is JSON, but no object.")
    body = record.pop("body", None)
    return {**(body if isinstance(body, dict) else {}), **record}


def _digest(
    path: str, stop: int | None = None, places: array[int] | None = None
) -> tuple[str, int]:
    """The digest of the first lines (None: of all), and how many lines were seen for it.

    `places` gets the offset of every thousandth line.
    """
    digest, count = blake2b(digest_size=16), 0
    for count, (offset, line) in enumerate(_lines(path), 1):
        if stop is not None and count > stop:
            break
        if places is not None and count % _PLACE_LINES == 1:
            places.append(offset)
        digest.update(line.rstrip(b"\r\n") + b"\n")  # the last line may get its end later
    return digest.hexdigest(), count


def _lines(path: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its offset, from the line that begins at `offset`.

    Of a line that is too long its beginning, a little too long.
    """
    with files.damage_as_os_error(), files.open_binary(path, sequential=True) as raw:
        file = cast(BinaryIO, gzip.open(raw)) if path.endswith(".gz") else raw
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES + 1):
            rest, begin = line, offset
            offset += len(line)
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
                offset += len(rest)
            if not line.isspace():
                yield begin, line
