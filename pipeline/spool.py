"""Holds encoded images between preparing and decoding, in one append-only file a shard.

The decoding processes read the files by path and offset, so that no picture travels through a
pipe. Equal bytes of a shard are kept once. Knows nothing of images or rows.
"""

from __future__ import annotations

import os
import tempfile
import threading
from hashlib import blake2b
from types import TracebackType
from typing import NamedTuple, Self

from pipeline.errors import EngineError
from pipeline.scratch import ScratchFile


class Spooled(NamedTuple):
    """Where a picture's bytes lie."""

    digest: bytes  # 16 bytes
    path: str
    offset: int
    num_bytes: int


class Spool:
    """Files of encoded images; `folder` is where they lie, by default the system's for such."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or tempfile.gettempdir()
        self._files: dict[str, _ShardFile] = {}
        self._lock = threading.Lock()

    def add(self, shard: str, data: bytes) -> Spooled:
        """Keeps `data` for the shard, once however often it is added."""
        digest = blake2b(data, digest_size=16).digest()
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _ShardFile(self._folder)
            return file.add(digest, data)

    def forget(self, shard: str) -> None:
        """Drops the shard's file. Readers that hold it open may finish."""
        with self._lock:
            file = self._files.pop(shard, None)
        if file is not None:
            file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return sum(file.num_bytes for file in self._files.values())

    def close(self) -> None:
        """Drops everything."""
        for shard in list(self._files):
            self.forget(shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _ShardFile:
    """One shard's bytes, end to end."""

    def __init__(self, folder: str) -> None:
        try:
            self._file = ScratchFile(folder)
        except OSError as error:
            raise EngineError(f"cannot keep images in {folder}: {error.strerror}") from error
        self._folder = folder
        self._known: dict[bytes, Spooled] = {}
        self.num_bytes = 0

    def add(self, digest: bytes, data: bytes) -> Spooled:
        known = self._known.get(digest)
        if known is None:
            self._append(data)
            known = Spooled(digest, self._file.path, self.num_bytes, len(data))
            self._known[digest] = known
            self.num_bytes += len(data)
        return known

    def close(self) -> None:
        self._file.close()

    def _append(self, data: bytes) -> None:
        """Writes behind the last whole picture, so that a failed write leaves no gap."""
        view = memoryview(data)
        offset = self.num_bytes
        try:
            while view:
                written = os.pwrite(self._file.fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise EngineError(f"cannot keep images in {self._folder}: {error.strerror}") from error
