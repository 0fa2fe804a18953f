"""Object stores and other places that fsspec reaches: opening and asking, with patience.

Errors that pass are tried again with growing pauses; what remains is an OSError, whatever class
of whatever package the store raised. Knows no file format. Imports fsspec only when it is needed.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import UserError

MAX_TRIES = 5
PAUSE_SEC = 0.25  # before the second try; doubled with each
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
_BUSY = frozenset({408, 425, 429})
_T = TypeVar("_T")


def is_local(path: str) -> bool:
    """Whether the path needs no fsspec."""
    return "://" not in path and "::" not in path


def filesystem_of(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of an address, and the name in it.

    Raises: ValueError or ImportError for an unknown protocol.
    """
    from fsspec.core import url_to_fs

    filesystem, name = url_to_fs(path)
    return filesystem, name


def patiently(work: Callable[[], _T]) -> _T:
    """`work()`, tried again while it fails. Raises: OSError of its kind when it is final."""
    for attempt in range(MAX_TRIES):
        try:
            return work()
        except _FINAL:
            raise
        except Exception as error:
            if attempt == MAX_TRIES - 1 or _is_refusal(error):
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(PAUSE_SEC * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a web server has said that asking again is of no use."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return 400 <= status < 500 and status not in _BUSY
        error = error.__cause__
    return False


class StoreFile(io.RawIOBase):
    """A file of a store, read patiently. Reads ask for exactly the bytes that are wanted."""

    def __init__(self, path: str, cache_type: str = "none") -> None:
        filesystem, name = filesystem_of(path)
        self._file = patiently(lambda: filesystem.open(name, "rb", cache_type=cache_type))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        place = self._file.tell()

        def read() -> bytes:
            self._file.seek(place)
            data: bytes = self._file.read(len(buffer))
            return data

        data = patiently(read)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_whole(path: str, max_bytes: int) -> bytes | None:
    """The file's bytes; None when it has more than `max_bytes`."""
    filesystem, name = filesystem_of(path)
    size = patiently(lambda: filesystem.info(name)).get("size") or 0
    if size > max_bytes:
        return None
    data: bytes = patiently(lambda: filesystem.cat_file(name, end=max_bytes + 1))
    return data if len(data) <= max_bytes else None
