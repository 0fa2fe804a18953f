"""Small inputs in every format that the sources read."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rows import Row
from pipeline.settings import InputSettings
from pipeline.sources import Source, open_source
from tests.helpers.pictures import jpeg


def opened(path: object, columns: Sequence[str] | None = None, **settings: Any) -> Source:
    """A source of the path, or of several."""
    paths = tuple(map(str, path)) if isinstance(path, list) else str(path)
    return open_source(InputSettings(path=paths, **settings), columns)


def all_rows(source: Source) -> list[Row]:
    """Every row of every file."""
    return [r for f in source.files() for r in source.read(f.path, 0, f.num_rows)]


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> str:
    """A Parquet file; values are lists or Arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return str(path)


def numbered(path: Path, count: int, **options: Any) -> str:
    """A file of `count` rows: id, text and a tiny picture each."""
    columns = {
        "id": [f"r{n}" for n in range(count)],
        "text": [f"text {n}" for n in range(count)],
        "image": [jpeg(8, 8, seed=n) for n in range(count)],
    }
    return write_parquet(path, columns, **options)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> str:
    """A tar file of these members in this order."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_lines(path: Path, records: Sequence[Any]) -> str:
    """A JSON-lines file; a record that is text stands as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)
