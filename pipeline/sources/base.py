"""What every source offers, and what all of them do alike with cells, ids and missing columns.

A source lists its files without reading their rows, and reads any range of one file's rows in
bounded memory. A row that cannot be read is still a row: it carries a RowError.
"""

from __future__ import annotations

import contextlib
import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings
from pipeline.sources import files
from pipeline.sources.cells import id_text, media_refs


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input; `fingerprint` changes when its content does.

    `mark` makes fingerprints that also tell whether a file has only grown.
    """

    path: str
    num_rows: int
    fingerprint: str
    num_bytes: int
    stamp: str = ""  # changes when the file is written anew, at the price of one look


class Source(ABC):
    """An input. Subclasses list files, tell the columns and read ranges of rows."""

    def __init__(self, settings: InputSettings, columns: Collection[str] | None = None) -> None:
        self.settings = settings
        self._asked = None if columns is None else frozenset(columns)
        self.addresses: dict[str, str] = {}  # by path, of files that lie elsewhere
        self._listed: dict[str, InputFile] = {}

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns that are no images, with their types."""

    @abstractmethod
    def list_files(self) -> list[InputFile]:
        """All files, sorted by path, before `settings.limit`."""

    @abstractmethod
    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop) of one file, in order; `read` checks their ids."""

    def files(self) -> list[InputFile]:
        """The files that hold the first `settings.limit` rows, sorted by path."""
        found = self.list_files()
        if not found:
            raise UserError(
                f"input.path {_paths(self.settings)} holds no {self.settings.source} files."
            )
        self._listed = {file.path: file for file in found}
        return found if self.settings.limit is None else _first_rows(found, self.settings.limit)

    def read(self, path: str, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop) of one file; `Row.index` counts from 0. A repeated id is an error.

        Raises: UserError when the file is no longer what `files` has seen.
        """
        self._check_unchanged(path)
        glance = files.glance(self.address(path))
        last: Row | None = None
        for row in self._checked_ids(path, start, stop):
            # NOTE: before each row, for its answer may be kept although the shard is never done.
            if (now := files.glance(self.address(path))) != glance:
                self._check_unchanged(path)
                glance = now
            if last is not None:
                yield last
            last = row
        self._check_unchanged(path)
        if last is not None:
            yield last

    def _checked_ids(self, path: str, start: int, stop: int) -> Iterator[Row]:
        seen: set[str] = set()
        for row in self.read_rows(path, start, stop):
            if row.row_id in seen and row.error is None:
                message = f"The id {row.row_id!r} stands on an earlier row of the shard too."
                row = replace(row, error=RowError("duplicate_id", message))
            seen.add(row.row_id)
            yield row

    def still_holds(self, path: str, fingerprint: str) -> bool:
        """Whether a file begins, now, with all the rows that it had with that fingerprint."""
        parts = fingerprint.split("-")
        with contextlib.suppress(OSError):  # `describe` says what is wrong with the file
            if len(parts) == 3 and self.begins_as(path, int(parts[0]), parts[1]):
                return True
        return self.describe(path).fingerprint == fingerprint

    def describe(self, path: str) -> InputFile:
        """What `list_files` tells of one file, looked at afresh."""
        for file in self.list_files():
            if file.path == path:
                return file
        raise UserError(f"the input no longer has {path}.")

    def stamp(self, path: str) -> str:
        """What `InputFile.stamp` would be now."""
        return files.stamp(self.address(path), afresh=True)

    def _check_unchanged(self, path: str) -> None:
        known = self._listed.get(path)
        if known is None or (stamp := self.stamp(path)) == known.stamp:
            return
        if not self.still_holds(path, known.fingerprint):
            raise UserError(
                f"The input file {path} was changed while the job ran: put it back, or run the job "
                "with --changed redo."
            )
        self._listed[path] = replace(known, stamp=stamp)

    def begins_as(self, path: str, num_rows: int, digest: str) -> bool:
        """Whether the first rows of a file, which has more, have this digest."""
        return self.beginning(path, num_rows) == digest

    def beginning(self, path: str, num_rows: int) -> str | None:
        """The digest of a file's first rows; None where it has no more than these."""
        return None

    def address(self, path: str) -> str:
        """Where the file of a path lies."""
        return self.addresses.get(path, path)

    def wanted(self, available: Sequence[str]) -> list[str]:
        """The columns of a file to read beside its images, in the file's order."""
        skip = {self.settings.image, self.settings.video, self.settings.audio}
        if self._asked is None:
            return [name for name in available if name not in skip]
        needed = self._asked | set(self.settings.keep)
        needed |= {name for name in (self.settings.id, self.settings.messages) if name}
        return [name for name in available if name in needed]

    def media(self, available: Collection[str]) -> dict[str, str]:
        """The columns of images, videos and recordings that a file has, by kind."""
        s = self.settings
        named = {"image": s.image, "video": s.video, "audio": s.audio}
        return {kind: name for kind, name in named.items() if name and name in available}

    def check_columns(self, available: Collection[str], path: str) -> None:
        """Raises the UserError that names a missing column and the nearest one there is."""
        asked = {"input.id": self.settings.id, "input.image": self.settings.image}
        asked |= {"input.messages": self.settings.messages, "input.video": self.settings.video}
        asked["input.audio"] = self.settings.audio
        asked |= {f"input.keep[{i}]": name for i, name in enumerate(self.settings.keep)}
        asked |= {f"the prompts' {{{name}}}": name for name in sorted(self._asked or ())}
        for key, name in asked.items():
            if name is not None and name not in available:
                raise UserError(_no_column(key, name, available, path))

    def make_row(
        self, path: str, start: int, number: int, record: Mapping[str, Any],
        image: Any = None, video: Any = None, audio: Any = None,
    ) -> Row:  # fmt: skip
        """The row of a record; a RowError among the values becomes the row's error."""
        row_id, error = f"{file_name(path)}:{number}", None
        images: tuple[ImageRef, ...] = ()
        videos: tuple[ImageRef, ...] = ()
        audios: tuple[ImageRef, ...] = ()
        try:
            if self.settings.id is not None:
                row_id = id_text(record.get(self.settings.id))
            for value in (*record.values(), image, video, audio):
                if isinstance(value, RowError):
                    raise value
            images = media_refs(image, "image", self.settings.max_images)
            videos = media_refs(video, "video", self.settings.max_videos)
            audios = media_refs(audio, "audio", self.settings.max_audios)
        except RowError as raised:
            error = raised
            record = {k: None if isinstance(v, RowError) else v for k, v in record.items()}
        messages = record.get(self.settings.messages) if self.settings.messages else None
        return Row(row_id, number - start, record, images, messages, error, videos, audios)


def take_media(record: dict[str, Any], media: Mapping[str, str]) -> dict[str, Any]:
    """The cells of the record's images and the like by kind, taken out of it."""
    return {kind: record.pop(name, None) for kind, name in media.items()}


def mark(num_rows: int, beginning: str, content: str) -> str:
    """A fingerprint of which `still_holds` makes use; `beginning` is that of all the rows."""
    return f"{num_rows}-{beginning}-{content}"


def file_name(path: str) -> str:
    """The last part of a path or address."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _first_rows(files: list[InputFile], limit: int) -> list[InputFile]:
    kept = []
    for file in files:
        if limit <= 0:
            break
        kept.append(replace(file, num_rows=min(limit, file.num_rows)))
        limit -= file.num_rows
    return kept


def _no_column(key: str, name: str, available: Collection[str], path: str) -> str:
    near = difflib.get_close_matches(name, available, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(available))}."
    if key == "input.image" and not near:
        hint += " Set input.image to null for rows without images."
    return f"{key} names the column {name!r}, which {path} does not have; {hint}"


def _paths(settings: InputSettings) -> str:
    return settings.path if isinstance(settings.path, str) else ", ".join(settings.path)
