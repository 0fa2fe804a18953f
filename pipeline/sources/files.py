"""Finds and opens input files, local or at any fsspec address, and fingerprints their content.

Knows no file format. fsspec is imported only when an address needs it.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.errors import EngineError, UserError
from pipeline.stores import StoreFile, filesystem_of, is_local, patiently

_MAGIC = "*?["
_PINNED = re.compile(r"@[0-9a-f]{40}/")  # an address of the hub that names a commit
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "VersionId")
_T = TypeVar("_T")


def expand(paths: str | Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The files that paths, globs and folders name, each once, sorted."""
    found: set[str] = set()
    for path in (paths,) if isinstance(paths, str) else paths:
        names = _expand_local(path, suffixes) if is_local(path) else _expand_remote(path, suffixes)
        if not names:
            raise UserError(f"input.path {path!r} matches no file.")
        found.update(names)
    return sorted(found)


def _expand_local(path: str, suffixes: tuple[str, ...]) -> list[str]:
    path = _shipped(os.path.expanduser(path))
    if os.path.isdir(path):
        return [name for name in _walk(path) if name.endswith(suffixes)]
    if os.path.isfile(path):
        return [os.path.normpath(path)]
    if any(letter in path for letter in _MAGIC):
        matches = glob.glob(path, recursive=True)
        return [os.path.normpath(name) for name in matches if os.path.isfile(name)]
    raise UserError(f"input.path {path!r} does not exist.")


def _shipped(path: str) -> str:
    """Where the data that ships with the package lies, for `pipeline/demo/…` from any folder."""
    if not path.startswith("pipeline/demo/") or os.path.exists(path):
        return path
    return os.path.join(os.path.dirname(__file__), "..", "..", path)


def _walk(folder: str) -> Iterable[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        yield from (os.path.normpath(os.path.join(root, n)) for n in names if not _hidden(n))


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _expand_remote(path: str, suffixes: tuple[str, ...]) -> list[str]:
    if _PASSWORD.search(path):
        raise UserError(
            f"input.path {path!r} holds a password, which the run folder would keep: give it "
            "to the store's own configuration or environment."
        )
    try:
        filesystem, name = filesystem_of(path)
        names = patiently(lambda: _list(filesystem, name, suffixes))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"input.path {path!r} cannot be listed: {error}.") from error
    return [str(filesystem.unstrip_protocol(n)) for n in names]


def _list(filesystem: Any, name: str, suffixes: tuple[str, ...]) -> list[str]:
    if any(letter in name for letter in _MAGIC):
        found = filesystem.glob(name, detail=True)
        return [n for n, info in found.items() if info["type"] == "file"]
    if not filesystem.isdir(name):
        return [name] if filesystem.exists(name) else []
    names = [n for n in filesystem.find(name) if n.endswith(suffixes)]
    return [n for n in names if not _hidden(n.rsplit("/", 1)[-1])]


def open_binary(path: str, sequential: bool = False) -> BinaryIO:
    """A seekable file; reads of it may raise OSError."""
    if is_local(path):
        return open(path, "rb")
    if sequential:
        return io.BufferedReader(StoreFile(path, "readahead"), 1 << 20)
    return cast(BinaryIO, StoreFile(path))


def size_and_version(path: str) -> tuple[int, str | None]:
    """Bytes of a file, and the store's own content version where it has one."""
    if is_local(path):
        return os.stat(path).st_size, None
    filesystem, name = filesystem_of(path)
    info = patiently(lambda: filesystem.info(name))
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), None)
    return int(info["size"]), version


def glance(path: str) -> tuple[int, int, int] | None:
    """What a change of a local file changes, at next to no cost; None where that is not so."""
    if not is_local(path):
        return None
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns, info.st_ino


def stamp(path: str, *, afresh: bool = False) -> str:
    """Changes when a file is written anew or replaced. Raises: EngineError.

    `afresh`: whatever a listing has told before.
    """
    try:
        if is_local(path):
            info = os.stat(path)
            return f"{info.st_size} {info.st_mtime_ns} {info.st_ino}"
        if _PINNED.search(path):
            return ""
        if afresh:
            filesystem, name = filesystem_of(path)
            filesystem.invalidate_cache(name)
        return " ".join(map(str, size_and_version(path)))
    except OSError as error:
        raise read_error(path, error) from error


def fingerprint(file: BinaryIO, size: int, version: str | None, *known: bytes) -> str:
    """Hash of a file's size, of what is `known` of it, and of samples unless it has a version.

    Copying, moving or touching a file leaves the fingerprint; a change that keeps the size and
    misses every sample and everything `known` is not seen.
    """
    digest = blake2b(str(size).encode(), digest_size=16)
    for part in known:
        digest.update(part)
    if version is not None:
        digest.update(version.encode())
        return digest.hexdigest()
    step = max(_SAMPLE_BYTES, size // _NUM_SAMPLES)
    for offset in range(0, size, step):
        file.seek(offset)
        digest.update(file.read(min(_SAMPLE_BYTES, size - offset)))
    return digest.hexdigest()


def in_threads(work: Callable[[str], _T], paths: Sequence[str]) -> list[_T]:
    """`work` of each path, in order; many footers are read at once."""
    if len(paths) <= 2:
        return [work(path) for path in paths]
    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        return list(pool.map(work, paths))


@contextmanager
def damage_as_os_error() -> Iterator[None]:
    """Turns what decompressors and archives raise of damaged files into OSError."""
    try:
        yield
    except (EOFError, zlib.error, tarfile.TarError, OverflowError, UnicodeDecodeError) as error:
        raise OSError(f"it is damaged: {error}") from error


def read_error(path: str, error: BaseException) -> EngineError:
    """The error of an input that could be listed and cannot be read now."""
    return EngineError(f"cannot read {path}: {error}")


def list_folder(folder: str) -> list[tuple[str, int]]:
    """(name, bytes) of the visible files that lie directly in a folder."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            return [
                (e.name, e.stat().st_size) for e in entries if e.is_file() and not _hidden(e.name)
            ]
    filesystem, name = filesystem_of(folder)
    infos = filesystem.ls(name, detail=True)
    pairs = [(i["name"].rsplit("/", 1)[-1], int(i["size"])) for i in infos if i["type"] == "file"]
    return [(name, size) for name, size in pairs if not _hidden(name)]


def arrow_type(value: Any) -> Any:
    """The Arrow type of a Python value; text when it has none of its own."""
    import pyarrow as pa

    try:
        found = pa.infer_type([value])
    except (pa.ArrowException, TypeError, ValueError):
        return pa.string()
    return pa.string() if pa.types.is_null(found) else found
