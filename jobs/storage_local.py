"""A run folder on a POSIX filesystem, NFS and Lustre included.

Every file becomes visible by one atomic step (`link`, or `renameat2` where links are refused) after
its content and then its folder were synced. Knows nothing of what is stored.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jobs.faults import fault
from jobs.storage import NUM_TRIES, Entry, StorageError, retrying
from pipeline.errors import UserError

T = TypeVar("T")
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class LocalStorage:
    """Files under a local folder."""

    is_local = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self._counter = itertools.count()

    def url(self, name: str) -> str:
        return os.path.join(self.root, name)

    def read(self, name: str) -> bytes:
        def operation() -> bytes:
            fault("storage.read")
            with open(self.url(name), "rb") as file:
                return file.read()

        return self._guard(f"reading {name}", operation)

    def tail(self, name: str, num_bytes: int) -> bytes:
        def operation() -> bytes:
            fault("storage.read")
            with open(self.url(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - num_bytes, 0))
                return file.read()

        return self._guard(f"reading {name}", operation)

    def exists(self, name: str) -> bool:
        return self.token(name) is not None

    def token(self, name: str) -> str | None:
        # NOTE: opening makes an NFS client ask the server; a bare stat may answer from its cache.
        def operation() -> str | None:
            try:
                descriptor = os.open(self.url(name), os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                return _token(os.fstat(descriptor))
            finally:
                os.close(descriptor)

        return self._guard(f"opening {name}", operation)

    def names(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._scan(folder, stat.S_ISREG))

    def entries(self, folder: str) -> list[Entry]:
        found = []
        for entry in self._scan(folder, stat.S_ISREG):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # deleted since the listing
                continue
            found.append(Entry(entry.name, status.st_size, _token(status)))
        return sorted(found, key=lambda entry: entry.name)

    def folders(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._scan(folder, stat.S_ISDIR))

    def write_exclusive(self, name: str, data: bytes) -> bool:
        private = self._write_private(name, data)
        try:
            return self.publish_exclusive(private, name)
        finally:
            private.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes) -> None:
        private = self._write_private(name, data)
        try:
            self._guard(f"writing {name}", lambda: os.replace(private, self.url(name)))
        finally:
            private.unlink(missing_ok=True)
        self._sync_folder(name)

    def publish_exclusive(self, local: Path, name: str) -> bool:
        target = Path(self.url(name))
        made = self._guard(f"committing {name}", lambda: _link(local, target))
        self._sync_folder(name)
        local.unlink(missing_ok=True)
        return made

    def publish_replace(self, local: Path, name: str, token: str | None = None) -> bool:
        def operation() -> bool:
            try:
                os.replace(local, self.url(name))
            except FileNotFoundError:
                return False
            return True

        made = self._guard(f"replacing {name}", operation)
        self._sync_folder(name)
        return made

    def delete(self, name: str) -> None:
        def operation() -> None:
            fault("storage.delete")
            Path(self.url(name)).unlink(missing_ok=True)

        # NOTE: nothing rests on a file being gone, so that it is not waited for.
        self._guard(f"deleting {name}", operation, num_tries=2)

    def delete_folder(self, folder: str) -> None:
        fault("storage.delete")
        shutil.rmtree(self.url(folder), ignore_errors=True)

    def make_private(self, name: str) -> Path:
        path = Path(self.url(name))
        if not path.parent.is_dir():
            self._guard(f"creating {path.parent}", lambda: os.makedirs(path.parent, exist_ok=True))
        return path

    def sync_file(self, path: Path) -> None:
        """Bring a closed file's content to the disk.

        A failed sync is never repeated: the kernel has dropped the pages that it could not write,
        and the next sync would lie.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise StorageError(f"syncing {path} failed: {error}") from error
        finally:
            os.close(descriptor)

    def check_writable(self) -> None:
        try:
            os.makedirs(self.root, exist_ok=True)
            probe = self._write_private("probe", b"")
            probe.unlink()
        except (OSError, StorageError) as error:
            reason = error.__cause__ if isinstance(error, StorageError) else error
            text = getattr(reason, "strerror", None) or str(reason)
            raise UserError(f"output.path {self.root} cannot be written: {text}.") from error

    def _write_private(self, name: str, data: bytes) -> Path:
        """A synced private file, on the same filesystem, that holds `data`."""
        label = name.replace("/", "_")
        private = self.make_private(
            f"tmp/{label}.{os.getpid()}.{next(self._counter)}.{_nonce()}.tmp"
        )

        def operation() -> None:
            fault("storage.write")
            with open(private, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        try:
            self._guard(f"writing {name}", operation)
        except BaseException:
            private.unlink(missing_ok=True)
            raise
        self.make_private(name)
        return private

    def _scan(self, folder: str, is_kind: Callable[[int], bool]) -> list[os.DirEntry[str]]:
        def operation() -> list[os.DirEntry[str]]:
            fault("storage.list")
            try:
                with os.scandir(self.url(folder)) as entries:
                    found = list(entries)
            except FileNotFoundError:
                return []
            if is_kind is stat.S_ISDIR:
                return [entry for entry in found if entry.is_dir(follow_symlinks=False)]
            return [entry for entry in found if entry.is_file(follow_symlinks=False)]

        return self._guard(f"listing {folder}", operation)

    def _sync_folder(self, name: str) -> None:
        descriptor = os.open(os.path.dirname(self.url(name)), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # NOTE: some network filesystems cannot sync a folder; their server orders the names.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise StorageError(f"syncing the folder of {name} failed: {error}") from error
        finally:
            os.close(descriptor)

    def _guard(self, what: str, operation: Callable[[], T], num_tries: int = NUM_TRIES) -> T:
        try:
            return retrying(what, operation, num_tries=num_tries)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{what} failed: {error}") from error


def _nonce() -> str:
    return os.urandom(4).hex()


def _token(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _link(local: Path, target: Path) -> bool:
    """Give a finished file its final name if that name is free; False when it is taken."""
    try:
        os.link(local, target, follow_symlinks=False)
    except FileExistsError:
        # NOTE: an NFS server may have made the link and lost its reply; then it is ours.
        return _same_file(local, target)
    except FileNotFoundError:
        if local.exists():
            raise
        return False  # a later attempt has cleaned our private file away
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_exclusive(local, target)
    return True


def _same_file(local: Path, target: Path) -> bool:
    try:
        return os.path.samefile(local, target)
    except FileNotFoundError:
        return False


def _rename_exclusive(local: Path, target: Path) -> bool:
    """`renameat2(RENAME_NOREPLACE)`, for filesystems without hard links."""
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(local), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in (errno.EINVAL, errno.ENOSYS):
        raise UserError(
            f"{target.parent} lies on a filesystem without an exclusive atomic step (neither hard "
            "links nor renameat2); choose another output.path."
        )
    raise OSError(code, os.strerror(code), str(target))
