"""Holds encoded images between preparing and decoding, in one append-only file a shard.

The decoding processes read the files by path and offset, so that no picture travels through a
pipe. Equal bytes of a shard are kept once. Where the system allows it the files have no name:
they vanish with the process, even when it is killed. Knows nothing of images or rows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from hashlib import blake2b
from types import TracebackType
from typing import NamedTuple, Self

from pipeline.errors import EngineError


class Spooled(NamedTuple):
    """Where a picture's bytes lie."""

    digest: bytes  # 16 bytes
    path: str
    offset: int
    num_bytes: int


class Spool:
    """Files of encoded images; `folder` is where they lie, by default a temporary one."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._temporary: str | None = None
        self._files: dict[str, _ShardFile] = {}
        self._lock = threading.Lock()

    def add(self, shard: str, data: bytes) -> Spooled:
        """Keeps `data` for the shard, once however often it is added."""
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _ShardFile(self._make_folder())
            return file.add(data)

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
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make_folder(self) -> str:
        if self._folder is not None:
            os.makedirs(self._folder, exist_ok=True)
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.mkdtemp(prefix="vlm-batch-spool-")
        return self._temporary


class _ShardFile:
    """One shard's bytes. `path` is /proc/<pid>/fd/<n> when the file could be left nameless."""

    def __init__(self, folder: str) -> None:
        self._fd, self.path = tempfile.mkstemp(prefix="images-", suffix=".spool", dir=folder)
        self._named = True
        self._known: dict[bytes, Spooled] = {}
        self.num_bytes = 0
        self._drop_name()

    def add(self, data: bytes) -> Spooled:
        digest = blake2b(data, digest_size=16).digest()
        known = self._known.get(digest)
        if known is None:
            self._append(data)
            known = Spooled(digest, self.path, self.num_bytes, len(data))
            self._known[digest] = known
            self.num_bytes += len(data)
        return known

    def close(self) -> None:
        os.close(self._fd)
        if self._named:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        offset = self.num_bytes
        try:
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            reason = error.strerror
            raise EngineError(f"cannot keep images in {self.path}: {reason}") from error

    def _drop_name(self) -> None:
        nameless = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            os.close(os.open(nameless, os.O_RDONLY))
        except OSError:
            return  # no /proc here: the name stays until close
        os.unlink(self.path)
        self.path, self._named = nameless, False
