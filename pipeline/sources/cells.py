"""From the cells of a table to Python values, ids and image references.

A cell without a meaningful value becomes a RowError in its place. Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.rows import PLURALS, ImageRef


def records(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a batch as dictionaries."""
    names = batch.schema.names
    columns = [values(batch.column(number), name) for number, name in enumerate(names)]
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def values(array: pa.Array, name: str) -> list[Any]:
    """A column as Python values; a RowError stands where a value has none."""
    try:
        values: list[Any] = array.to_pylist()
        return values
    except (ValueError, OverflowError):  # UnicodeDecodeError too
        return [_cell(scalar, name) for scalar in array]


def _cell(scalar: pa.Scalar, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return RowError("bad_row", f"The column {name!r} is not valid UTF-8.")
    except (ValueError, OverflowError) as error:
        return RowError("bad_row", f"The column {name!r} holds a value without meaning: {error}.")


def id_text(value: Any) -> str:
    """An id as text; null, lists and structs are errors."""
    if isinstance(value, str):
        return value
    if isinstance(value, RowError):
        raise value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value is None or isinstance(value, list | tuple | dict):
        kind = "null" if value is None else "a list or struct"
        raise RowError("bad_row", f"The row's id is {kind}.")
    return str(value)


def media_refs(cell: Any, kind: str, limit: int) -> tuple[ImageRef, ...]:
    """One cell's images or the like: bytes, a {bytes, path} struct, a path or URL, or a list."""
    if not isinstance(cell, list | tuple):
        ref = _ref(cell, kind)
        return () if ref is None else (ref,)
    if len(cell) > limit:
        message = f"The row has {len(cell)} {PLURALS[kind]}; input.max_{kind}s is {limit}."
        raise RowError(f"too_many_{kind}s", message)
    refs = []
    for number, part in enumerate(cell):
        ref = _ref(part, kind)
        if ref is None:
            message = f"{kind.capitalize()} {number} of the row's list is null."
            raise RowError(f"missing_{kind}", message)
        refs.append(ref)
    return tuple(refs)


def _ref(cell: Any, kind: str) -> ImageRef | None:
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            cell = cell["bytes"]
        elif "path" in cell or "bytes" in cell:
            cell = cell.get("path")
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        return ImageRef(path=cell, kind=kind)
    if isinstance(cell, bytes | bytearray | memoryview):
        return ImageRef(data=bytes(cell), kind=kind)
    found = "a list inside a list" if isinstance(cell, list) else f"a {type(cell).__name__}"
    raise RowError("bad_row", f"The {kind} is neither bytes nor a path, but {found}.")
