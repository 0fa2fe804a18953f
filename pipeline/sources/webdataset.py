"""Rows of WebDataset tar files: one row a sample, which is the files that share a key.

Pictures of a sample are its images, and its videos and recordings where those are asked for; a
`.json` gives its keys as columns, text files give a column of their extension's name. Counting
rows walks the headers, since a tar file has no index. Knows no other archive.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.rows import Row
from pipeline.sources import files
from pipeline.sources.base import InputFile, Source, mark
from pipeline.sources.folder import AUDIO_SUFFIXES, SUFFIXES, VIDEO_SUFFIXES

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key, extension
_TARS = (".tar", ".tar.gz", ".tgz")
_TEXTS = frozenset({"txt", "text", "caption", "cls", "id", "url", "prompt", "question", "answer"})
_SUFFIXES = {"image": SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}
_MAX_TEXT_BYTES = 16 << 20
_HEAD_BYTES = 512


class _Member(NamedTuple):
    """One file of a sample."""

    extension: str
    info: tarfile.TarInfo


class WebDatasetSource(Source):
    """`input.source: webdataset`. `input.image` is `image` for every picture, or an extension.

    `input.video` likewise is `video` or an extension, `input.audio` is `audio` or one.
    """

    def schema(self) -> pa.Schema:
        record = self._first_record()
        return pa.schema([(n, files.arrow_type(record[n])) for n in self.wanted(list(record))])

    def list_files(self) -> list[InputFile]:
        return files.in_threads(self.describe, self.find_paths())

    def find_paths(self) -> list[str]:
        """The paths of the input, sorted."""
        return sorted(self.addresses) or files.expand(self.settings.path, _TARS)

    def beginning(self, path: str, num_rows: int) -> str | None:
        digest, count = _digest(self.address(path), num_rows)
        return digest if count > num_rows else None

    def describe(self, path: str) -> InputFile:
        return replace(_input_file(self.address(path)), path=path)

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        number = -1
        try:
            with _open(self.address(path)) as tar:
                for number, (key, members) in enumerate(_samples(tar)):
                    if number >= stop:
                        return
                    if number >= start:
                        yield self._row(tar, path, start, number, key, members)
        except OSError as error:
            raise files.read_error(path, error) from error
        if number + 1 < stop:
            raise files.read_error(path, ValueError("it has fewer samples than it had"))

    def _row(
        self,
        tar: tarfile.TarFile,
        path: str,
        start: int,
        number: int,
        key: str,
        members: list[_Member],
    ) -> Row:
        cells = {kind: self._media(tar, kind, members) for kind in _SUFFIXES}
        record = _record(tar, key, members)
        wanted = {name: record[name] for name in self.wanted(list(record))}
        return self.make_row(path, start, number, wanted, **cells)

    def _media(self, tar: tarfile.TarFile, kind: str, members: list[_Member]) -> Any:
        """The sample's images or the like: none, one, a list, or an error."""
        try:
            found = [self._whole(tar, kind, m) for m in members if self._is(kind, m)]
        except RowError as error:
            return error
        return None if not found else found[0] if len(found) == 1 else found

    def _is(self, kind: str, member: _Member) -> bool:
        chosen = getattr(self.settings, kind)
        if chosen in (None, kind):
            return chosen is not None and f".{member.extension}".endswith(_SUFFIXES[kind])
        return member.extension == chosen

    def _whole(self, tar: tarfile.TarFile, kind: str, member: _Member) -> bytes:
        s = self.settings
        limits = {"video": s.max_video_bytes, "audio": s.max_audio_bytes}
        limit = limits.get(kind, s.max_bytes)
        if member.info.size > limit:
            raise RowError("file_too_large", f"The {kind} has more than {limit} bytes.")
        return _content(tar, member)

    def _first_record(self) -> dict[str, Any]:
        for path in self.find_paths():
            try:
                with _open(self.address(path)) as tar:
                    for key, members in _samples(tar):
                        return _record(tar, key, members)
            except OSError as error:
                raise UserError(f"{path} is no readable tar file: {error}.") from error
        return {}


def _record(tar: tarfile.TarFile, key: str, members: list[_Member]) -> dict[str, Any]:
    """The sample's columns that are no pictures."""
    record: dict[str, Any] = {"__key__": key}
    for member in members:
        kind = member.extension.rpartition(".")[2].lower()
        if kind == "json":
            value = _json(tar, member)
            record |= value if isinstance(value, dict) else {member.extension: value}
        elif kind in _TEXTS:
            record[member.extension] = _text(tar, member)
    return record


def _json(tar: tarfile.TarFile, member: _Member) -> Any:
    text = _text(tar, member)
    if isinstance(text, RowError):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError("bad_row", f"The sample's {member.extension} is no JSON: {error}.")


def _text(tar: tarfile.TarFile, member: _Member) -> str | RowError:
    if member.info.size > _MAX_TEXT_BYTES:
        return RowError("bad_row", f"The sample's {member.extension} is too large for text.")
    try:
        return _content(tar, member).decode()
    except UnicodeDecodeError:
        return RowError("bad_row", f"The sample's {member.extension} is not valid UTF-8.")


def _content(tar: tarfile.TarFile, member: _Member) -> bytes:
    file = tar.extractfile(member.info)
    return file.read() if file is not None else b""


@contextmanager
def _open(path: str) -> Iterator[tarfile.TarFile]:
    with files.damage_as_os_error(), files.open_binary(path, sequential=True) as raw:
        if path.endswith(".tar"):
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                yield tar
        else:
            with tarfile.open(fileobj=raw, mode="r:gz") as tar:
                yield tar


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[_Member]]]:
    """Neighbouring files with the same key; a repeated extension begins a new sample."""
    key = ""
    members: list[_Member] = []
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else every header is kept
        match = _NAME.fullmatch(info.name)
        if match is None or not info.isfile():
            continue
        if members and (match[1] != key or match[2] in {m.extension for m in members}):
            yield key, members
            members = []
        key = match[1]
        members.append(_Member(match[2], info))
    _check_end(tar)
    if members:
        yield key, members


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes anything but a header for the end; only the end mark shows a whole file."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")


def _input_file(path: str) -> InputFile:
    try:
        stamp = files.stamp(path)
        size, version = files.size_and_version(path)
        digest, count = _digest(path)
        with files.open_binary(path) as raw:
            content = files.fingerprint(raw, size, version)
    except OSError as error:
        raise UserError(f"{path} is no readable tar file: {error}.") from error
    return InputFile(path, count, mark(count, digest, content), size, stamp)


def _digest(path: str, stop: int | None = None) -> tuple[str, int]:
    """The digest of the first samples (None: of all), and how many were seen for it.

    Of each file it holds the name, the size and the first bytes.
    """
    digest, count = blake2b(digest_size=16), 0
    with _open(path) as tar:
        for count, (key, members) in enumerate(_samples(tar), 1):
            if stop is not None and count > stop:
                break
            for member in members:
                head = tar.extractfile(member.info)
                digest.update(f"{key}\0{member.extension}\0{member.info.size}\0".encode())
                digest.update(b"" if head is None else head.read(_HEAD_BYTES))
    return digest.hexdigest(), count
