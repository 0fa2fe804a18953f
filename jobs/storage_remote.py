"""A run folder on an object store through fsspec; S3 is the one that tests prove.

The exclusive step is a conditional put (`If-None-Match: *`), so a name appears whole and once.
Nothing is renamed and nothing is appended. Knows nothing of what is stored.
"""

from __future__ import annotations

import errno
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jobs.faults import fault
from jobs.storage import Entry, StorageError, retrying
from pipeline.errors import UserError

T = TypeVar("T")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_PUT_BYTES = 64 << 20  # larger files go up in parts
_TRY_AGAIN_STATUS = frozenset({429, 500, 502, 503, 504})
_TRY_AGAIN_CODES = frozenset({"ConditionalRequestConflict", "OperationAborted", "SlowDown"})
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash")
_CLIENTS = frozenset({"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "azure", "adlfs"})


class RemoteStorage:
    """Objects under an address such as `s3://bucket/captions`."""

    is_local = False

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        scheme = root.split("://", 1)[0]
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(scheme)
            hint = f' Install it with: pip install "vlm-batch[{extra}]".' if extra else ""
            raise UserError(f"output.path {root}: {scheme}:// cannot be opened.{hint}") from error
        self._is_s3 = scheme in ("s3", "s3a")
        self._lock = threading.Lock()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        def operation() -> bytes:
            fault("storage.read")
            data: bytes = self._fs.cat_file(self._key(name))
            return data

        return self._guard(f"reading {name}", operation)

    def tail(self, name: str, num_bytes: int) -> bytes:
        def operation() -> bytes:
            fault("storage.read")
            try:
                data: bytes = self._fs.cat_file(self._key(name), start=-num_bytes)
            except OSError as error:
                if _code(error) != "InvalidRange":  # what an empty object answers
                    raise
                return b""
            return data

        return self._guard(f"reading {name}", operation)

    def exists(self, name: str) -> bool:
        return self.token(name) is not None

    def token(self, name: str) -> str | None:
        def operation() -> str | None:
            try:
                self._fs.invalidate_cache()
                info = self._fs.info(self._key(name))
            except FileNotFoundError:
                return None
            return _version(info) or self._listed_token(name)

        return self._guard(f"looking at {name}", operation)

    def names(self, folder: str) -> list[str]:
        return [entry.name for entry in self.entries(folder)]

    def entries(self, folder: str) -> list[Entry]:
        found = [
            Entry(_last(info["name"]), info["size"] or 0, _token(info))
            for info in self._list(folder)
            if info["type"] == "file" and _last(info["name"])
        ]
        return sorted(found, key=lambda entry: entry.name)

    def folders(self, folder: str) -> list[str]:
        infos = self._list(folder)
        found = [info["name"].rstrip("/") for info in infos if info["type"] == "directory"]
        return sorted(_last(name) for name in found)

    def write_exclusive(self, name: str, data: bytes) -> bool:
        def operation() -> bool:
            fault("storage.write")
            return self._put_exclusive(name, data)

        return self._guard(f"writing {name}", operation)

    def replace(self, name: str, data: bytes) -> None:
        def operation() -> None:
            fault("storage.write")
            self._fs.pipe_file(self._key(name), data)

        self._guard(f"writing {name}", operation)

    def publish_exclusive(self, local: Path, name: str) -> bool:
        if local.stat().st_size <= _PUT_BYTES:
            made = self.write_exclusive(name, local.read_bytes())
        else:
            made = self._guard(f"writing {name}", lambda: self._upload_exclusive(local, name))
        local.unlink(missing_ok=True)
        return made

    def publish_replace(self, local: Path, name: str, token: str | None = None) -> bool:
        data = local.read_bytes()
        made = self._guard(f"writing {name}", lambda: self._put_matching(name, data, token))
        local.unlink(missing_ok=True)
        return made

    def delete(self, name: str) -> None:
        def operation() -> None:
            fault("storage.delete")
            try:
                self._fs.rm_file(self._key(name))
            except FileNotFoundError:
                return

        self._guard(f"deleting {name}", operation)

    def delete_folder(self, folder: str) -> None:
        for name in self.names(folder):
            self.delete(f"{folder}/{name}")

    def make_private(self, name: str) -> Path:
        with self._lock:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="vlm-batch-")
        return Path(self._scratch.name) / name.replace("/", "_")

    def sync_file(self, path: Path) -> None:
        """A scratch file needs no disk: the object store keeps what it acknowledges."""

    def check_writable(self) -> None:
        name = "tmp/probe"
        try:
            self.replace(name, b"")
            self.delete(name)
        except (OSError, StorageError) as error:
            raise UserError(f"output.path {self.root} cannot be written: {error}.") from error

    def _listed_token(self, name: str) -> str | None:
        """For stores without versions, where a listing may tell times otherwise than a look."""
        folder, _, last = name.rpartition("/")
        return next((e.token for e in self.entries(folder) if e.name == last), None)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _list(self, folder: str) -> list[dict[str, Any]]:
        def operation() -> list[dict[str, Any]]:
            fault("storage.list")
            try:
                self._fs.invalidate_cache()
                return list(self._fs.ls(self._key(folder), detail=True))
            except FileNotFoundError:
                return []

        return self._guard(f"listing {folder}", operation)

    def _put_exclusive(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._key(name), data, mode="create")
        except OSError as error:
            if not _is_taken(error):
                raise
            # NOTE: an earlier try may have been stored and its reply lost; then it is ours.
            return self._holds(name, data)
        return True

    def _upload_exclusive(self, local: Path, name: str) -> bool:
        try:
            with open(local, "rb") as source, self._fs.open(self._key(name), "xb") as target:
                while chunk := source.read(16 << 20):
                    target.write(chunk)
        except OSError as error:
            if not _is_taken(error):
                raise
            return self._holds(name, local.read_bytes())
        return True

    def _put_matching(self, name: str, data: bytes, token: str | None) -> bool:
        """Put, on S3 only in place of the object that `token` names."""
        fault("storage.write")
        match = {}
        if token is not None and self._is_s3:
            match = {"IfMatch": token}
        try:
            self._fs.pipe_file(self._key(name), data, **match)
        except OSError as error:
            if not _is_taken(error):
                raise
            return self._holds(name, data)
        return True

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            info = self._fs.info(self._key(name))
            return bool(info["size"] == len(data) and self._fs.cat_file(self._key(name)) == data)
        except FileNotFoundError:
            return False

    def _guard(self, what: str, operation: Callable[[], T]) -> T:
        what = f"{what} in {self.root}"

        def translated() -> T:
            try:
                return operation()
            except OSError as error:
                raise _refined(error) from error
            except Exception as error:
                if type(error).__module__.split(".", 1)[0] in _CLIENTS:
                    raise _as_os_error(error) from error
                raise

        try:
            return retrying(what, translated)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{what} failed: {error}") from error


def _refined(error: OSError) -> OSError:
    """The same error, or EBUSY when the server's reply says that it may be asked again."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status in _TRY_AGAIN_STATUS or _code(error) in _TRY_AGAIN_CODES:
        return OSError(errno.EBUSY, str(error))
    return error


def _as_os_error(error: Exception) -> OSError:
    """A client library's own exception: a broken connection may mend, anything else may not."""
    broken = re.search(
        "Connect|Timeout|HTTPClient|Payload|Incomplete|Disconnect", repr(type(error))
    )
    return OSError(errno.ECONNRESET if broken else errno.EIO, f"{type(error).__name__}: {error}")


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _token(info: dict[str, Any]) -> str:
    plain = " ".join(str(info.get(key)) for key in ("mtime", "created", "size"))
    return _version(info) or plain


def _version(info: dict[str, Any]) -> str | None:
    """The ETag or what stands for it; it may be a hash of the content, so what must be seen to
    change holds a counter.
    """
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), None)


def _is_taken(error: OSError) -> bool:
    """Whether a conditional put was refused because the name exists."""
    if isinstance(error, FileExistsError):
        return True
    return _code(error) in ("PreconditionFailed", "412")


def _code(error: OSError) -> str | None:
    """The store's own name of an error."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code
