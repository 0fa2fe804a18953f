"""A part: one committed shard as a Parquet file that is its own commit record.

The footer's `vlm_batch` entry says what the file is; its `vlm_batch.digest` entry is the hash of
the whole file with the digest's own place zeroed, so any flipped byte shows. Knows nothing of
where parts lie and who may make them.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
KEY = b"vlm_batch"
DIGEST_KEY = b"vlm_batch.digest"
_DIGEST_CHARS = 32
_EMPTY_DIGEST = b"0" * _DIGEST_CHARS
_ROW_GROUP_BYTES = 64 << 20
_TAIL = 8  # footer length and magic bytes


class PartDamaged(Exception):
    """A part whose bytes are not those that were committed; the message says what is wrong."""


@dataclass(frozen=True)
class PartInfo:
    """The commit record in a part's footer."""

    shard: str
    attempt: str
    fingerprint: str
    num_rows: int
    states: dict[str, int]  # rows by state
    revision: int = 0
    input: dict[str, Any] = field(default_factory=dict)  # path, start, stop, fingerprint
    schema_version: int = SCHEMA_VERSION


def write_part(path: Path, table: pa.Table, info: PartInfo, compression: str = "zstd") -> None:
    """Write a part's file and fill its digest in; neither syncs nor names it."""
    schema = table.schema.remove_metadata()
    text = json.dumps(asdict(info), ensure_ascii=False, sort_keys=True)
    with pq.ParquetWriter(
        path, schema, compression=compression, write_page_checksum=True, write_batch_size=64
    ) as writer:
        for start, stop in _row_groups(table):
            writer.write_table(table.slice(start, stop - start))
        writer.add_key_value_metadata({KEY: text, DIGEST_KEY: _EMPTY_DIGEST})
    with open(path, "r+b") as file:
        offset = _digest_offset(file)
        digest = _digest(file, offset)
        file.seek(offset)
        file.write(digest)


def read_info(source: Any) -> PartInfo:
    """A part's commit record from its footer; `source` is a path, bytes or a file object.

    Raises: PartDamaged.
    """
    try:
        metadata = pq.read_metadata(io.BytesIO(source) if isinstance(source, bytes) else source)
        values = json.loads((metadata.metadata or {})[KEY])
        info = PartInfo(**{k: values[k] for k in PartInfo.__dataclass_fields__ if k in values})
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise PartDamaged(f"its footer cannot be read ({_first_line(error)})") from error
    if info.num_rows != metadata.num_rows:
        raise PartDamaged(f"it holds {metadata.num_rows} rows and says {info.num_rows}")
    return info


def footer_size(tail: bytes) -> int:
    """How many of a part's last bytes its footer takes; 0 where that cannot be told."""
    is_parquet = len(tail) >= _TAIL and tail.endswith(b"PAR1")
    return int.from_bytes(tail[-_TAIL:-4], "little") + _TAIL if is_parquet else 0


def check_part(data: bytes | Path) -> PartInfo:
    """Prove that a part is byte for byte what was committed.

    Raises: PartDamaged.
    """
    if isinstance(data, Path):
        if data.stat().st_size == 0:
            raise PartDamaged("it is empty")
        with open(data, "rb") as file:
            return _check(file, data)
    return _check(io.BytesIO(data), data)


def read_part(data: bytes | Path, columns: list[str] | None = None) -> pa.Table:
    """A part's table. Raises: PartDamaged."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return pq.read_table(
            source, columns=columns, partitioning=None, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise PartDamaged(f"it cannot be read ({_first_line(error)})") from error


def expected(shard: Any, fingerprint: str) -> Mapping[str, Any]:
    """What the commit record of a planned shard must say."""
    return {
        "shard": shard.id,
        "revision": shard.revision,
        "num_rows": shard.num_rows,
        "fingerprint": fingerprint,
    }


def _check(file: BinaryIO, data: bytes | Path) -> PartInfo:
    try:
        offset = _digest_offset(file)
    except ValueError as error:
        raise PartDamaged(str(error)) from error
    file.seek(offset)
    if file.read(_DIGEST_CHARS) != _digest(file, offset):
        raise PartDamaged("its bytes are not those that were committed")
    return read_info(data)


def _digest_offset(file: BinaryIO) -> int:
    """Where the digest's characters stand: in the footer, after the key and one length byte."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _TAIL, 0))
    tail = file.read()
    footer_size = int.from_bytes(tail[:4], "little") + _TAIL if len(tail) == _TAIL else 0
    if tail[4:] != b"PAR1" or footer_size > size:
        raise ValueError("it does not end as a Parquet file does")
    file.seek(size - footer_size)
    footer = file.read(footer_size)
    # NOTE: Thrift's compact strings: key, field header 0x18, length, value.
    mark = DIGEST_KEY + b"\x18" + bytes([_DIGEST_CHARS])
    position = footer.rfind(mark)
    if position < 0:
        raise ValueError("its footer has no digest")
    return size - footer_size + position + len(mark)


def _digest(file: BinaryIO, offset: int) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_CHARS // 2)
    file.seek(0)
    left = offset
    while left > 0:
        chunk = file.read(min(left, mmap.PAGESIZE * 256))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    digest.update(_EMPTY_DIGEST)
    file.seek(offset + _DIGEST_CHARS)
    while chunk := file.read(mmap.PAGESIZE * 256):
        digest.update(chunk)
    return digest.hexdigest().encode()


def _row_groups(table: pa.Table) -> list[tuple[int, int]]:
    """Row ranges of about `_ROW_GROUP_BYTES`; always at least one."""
    num_rows = table.num_rows
    groups = max(1, -(-table.nbytes // _ROW_GROUP_BYTES))
    step = max(1, -(-num_rows // groups))
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)] or [(0, 0)]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
