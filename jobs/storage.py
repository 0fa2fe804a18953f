"""Files of a run folder, local or on an object store, behind a handful of operations.

The one that all promises rest on is `write_exclusive`/`publish_exclusive`: a name appears whole,
or not at all, and at most one writer makes it. Locally that is a private file, fsync and `link`;
on an object store a conditional put. Knows nothing of what is stored.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import EngineError

log = logging.getLogger(__name__)
T = TypeVar("T")

NUM_TRIES = 6
FIRST_DELAY_SEC = 0.1
MAX_DELAY_SEC = 10.0


TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        getattr(errno, "EREMOTEIO", errno.EAGAIN),
    }
)


class StorageError(EngineError):
    """The run folder cannot be read or written now: ends the attempt, another may succeed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of one listing. `token` changes whenever the file's content is written anew."""

    name: str  # last component
    num_bytes: int
    token: str


class Storage(Protocol):
    """A run folder's files; names are relative to `root`."""

    root: str
    is_local: bool

    def url(self, name: str) -> str: ...

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""

    def tail(self, name: str, num_bytes: int) -> bytes:
        """The file's last bytes, all of a shorter one. Raises: FileNotFoundError."""

    def exists(self, name: str) -> bool: ...

    def token(self, name: str) -> str | None:
        """What `Entry.token` would be now, read afresh; None when the file is gone."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder, one listing; empty when it does not exist."""

    def entries(self, folder: str) -> list[Entry]:
        """Like `names`, with size and token."""

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in a folder."""

    def write_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file that must not exist; False when somebody else's is there."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file anew, whole at every moment."""

    def publish_exclusive(self, local: Path, name: str) -> bool:
        """Make a finished local file visible under a name that must not exist; consumes it."""

    def publish_replace(self, local: Path, name: str, token: str | None = None) -> bool:
        """Make a finished local file visible in place of what is there.

        On a local filesystem False when `local` is gone: another process has already moved it. On
        an object store False when the object is no longer the one of `token`.
        """

    def delete(self, name: str) -> None:
        """Delete a file; none there is no error."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all its files."""

    def make_private(self, name: str) -> Path:
        """A local path for a file that `publish_*` will take, on the right filesystem."""

    def sync_file(self, path: Path) -> None:
        """Bring a closed private file's content to the disk. Raises: StorageError."""

    def check_writable(self) -> None:
        """Raises: UserError when the folder cannot be made or written."""


def is_transient(error: OSError) -> bool:
    """Whether the same operation may succeed in a moment."""
    return isinstance(error, TimeoutError) or error.errno in TRANSIENT_ERRNOS


def retrying(
    what: str,
    operation: Callable[[], T],
    sleep: Callable[[float], None] = time.sleep,
    num_tries: int = NUM_TRIES,
) -> T:
    """Run an operation that may be repeated; wait longer and longer while its errors are transient.

    Raises: StorageError after the last try; any error that is not transient at once.
    """
    for number in range(1, num_tries + 1):
        try:
            return operation()
        except OSError as error:
            if not is_transient(error):
                raise
            if number == num_tries:
                raise StorageError(f"{what} failed {number} times: {error}") from error
            delay = min(FIRST_DELAY_SEC * 4 ** (number - 1), MAX_DELAY_SEC)
            log.warning("%s: %s; trying again", what, error)
            sleep(delay * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def open_storage(root: str) -> Storage:
    """The storage of a run folder's address."""
    from jobs.storage_local import LocalStorage

    if "://" not in root or root.startswith("file://"):
        return LocalStorage(root.removeprefix("file://"))
    from jobs.storage_remote import RemoteStorage

    return RemoteStorage(root)
