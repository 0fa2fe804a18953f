"""Rows of a folder of pictures, videos or recordings: one row a file, its name and path columns.

Every folder that holds some is an input file of the plan, its files sorted by name. Knows nothing
of what is inside them.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from hashlib import blake2b

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.rows import Row
from pipeline.sources import files
from pipeline.sources.base import InputFile, Source, mark
from pipeline.stores import is_local

_KINDS = "jpg jpeg png webp gif bmp tif tiff heic heif avif jxl jp2"  # some fail, none is skipped
SUFFIXES = tuple(f".{kind}" for name in _KINDS.split() for kind in (name, name.upper()))
_MOVING = "mp4 m4v mov mkv webm avi gif mpg mpeg ts wmv flv ogv 3gp"
VIDEO_SUFFIXES = tuple(f".{kind}" for name in _MOVING.split() for kind in (name, name.upper()))
_HEARD = "wav flac mp3 m4a aac ogg oga opus aif aiff"
AUDIO_SUFFIXES = tuple(f".{kind}" for name in _HEARD.split() for kind in (name, name.upper()))
_SUFFIXES = {"image": SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}
COLUMNS = ("file_name", "path", "folder")


class FolderSource(Source):
    """`input.source: folder`; its files are videos or recordings where those are asked for."""

    _last: tuple[tuple[str, str] | None, list[tuple[str, int]]] | None = None

    @property
    def kind(self) -> str:
        asked = self.settings
        return "audio" if asked.audio else "video" if asked.video else "image"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return _SUFFIXES[self.kind]

    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.wanted(COLUMNS)])

    def list_files(self) -> list[InputFile]:
        found = files.expand(self.settings.path, self.suffixes)
        folders = sorted({name.rpartition("/")[0] or "." for name in found})
        self.check_columns({*COLUMNS, self.kind}, folders[0] if folders else "a folder")
        return files.in_threads(self.describe, folders)

    def read_rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        pictures = self._known_pictures(path)
        if stop > len(pictures):
            raise files.read_error(path, ValueError("it has fewer pictures than it had"))
        columns = self.wanted(COLUMNS)
        for number in range(start, stop):
            name = pictures[number][0]
            address = f"{path}/{name}"
            values = dict(zip(COLUMNS, (name, address, path), strict=True))
            record = {column: values[column] for column in columns}
            whole = os.path.abspath(address) if is_local(address) else address
            cells = {self.kind: whole} if getattr(self.settings, self.kind) else {}
            yield self.make_row(path, start, number, record, **cells)

    def beginning(self, path: str, num_rows: int) -> str | None:
        pictures = self._pictures(path)
        return _digest(pictures[:num_rows]) if len(pictures) > num_rows else None

    def describe(self, path: str) -> InputFile:
        stamp = self.stamp(path)
        pictures = self._pictures(path)
        num_bytes, digest = sum(size for _, size in pictures), _digest(pictures)
        return InputFile(path, len(pictures), mark(len(pictures), digest, ""), num_bytes, stamp)

    def stamp(self, path: str) -> str:
        """A local folder's own time tells of files that come and go, at the price of one look."""
        return files.stamp(path) if is_local(path) else _digest(self._pictures(path))

    def _known_pictures(self, folder: str) -> list[tuple[str, int]]:
        """The last folder's pictures, listed anew when its stamp has changed."""
        stamp = (folder, files.stamp(folder)) if is_local(folder) else None
        if stamp is None or self._last is None or self._last[0] != stamp:
            self._last = (stamp, self._pictures(folder))
        return self._last[1]

    def _pictures(self, folder: str) -> list[tuple[str, int]]:
        """(name, bytes) of the folder's own pictures that `input.path` means, sorted."""
        kinds = self.suffixes
        try:
            found = [(n, size) for n, size in files.list_folder(folder) if n.endswith(kinds)]
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be listed: {error}.") from error
        masks = self._masks()
        if masks:
            found = [(n, s) for n, s in found if any(fnmatch.fnmatchcase(n, m) for m in masks)]
        return sorted(found)

    def _masks(self) -> list[str]:
        """The file name patterns of `input.path`; none when it names a whole folder."""
        paths = self.settings.path
        names = [paths] if isinstance(paths, str) else list(paths)
        masks = [name.rstrip("/").rpartition("/")[2] for name in names]
        return masks if all(mask.endswith(self.suffixes) or "*" in mask for mask in masks) else []


def _digest(pictures: list[tuple[str, int]]) -> str:
    digest = blake2b(digest_size=16)
    for name, size in pictures:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
