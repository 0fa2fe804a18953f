"""Arrow types of answers that follow a JSON schema, and their values.

Objects become structs, arrays lists, scalars their own type; what has no single Arrow type (unions,
free-form objects, recursion) stays JSON text. Knows nothing of rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_MAX_DEPTH = 16
_INT64 = range(-(2**63), 2**63)


class Unreadable(ValueError):
    """A text that does not hold the value that its schema promises."""


def arrow_type(schema: Mapping[str, Any]) -> pa.DataType:
    """The column type of answers under a schema."""
    return _type(schema, schema, 0)


def parse_answer(text: str, type_: pa.DataType) -> Any:
    """The answer's value for a column of `type_`. Raises: Unreadable."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from error
    return _fit(value, type_, "answer")


def _type(schema: Any, root: Mapping[str, Any], depth: int) -> pa.DataType:
    schema = _resolve(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return pa.string()
    kind = _kind(schema)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return pa.list_(_type(schema["items"], root, depth + 1))
    properties = schema.get("properties")
    if kind == "object" and properties and not schema.get("additionalProperties"):
        fields = [(name, _type(inner, root, depth + 1)) for name, inner in properties.items()]
        return pa.struct(fields)
    return pa.string()


def _resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    """Follow `$ref` inside the document, and a union with null alone."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return schema
        if isinstance(schema.get("$ref"), str):
            schema = _pointer(root, schema["$ref"])
            continue
        options = schema.get("anyOf") or schema.get("oneOf")
        if not isinstance(options, list):
            return schema
        left = [o for o in options if not (isinstance(o, Mapping) and o.get("type") == "null")]
        if len(left) != 1:
            return None
        schema = left[0]
    return None


def _pointer(root: Mapping[str, Any], reference: str) -> Any:
    if not reference.startswith("#"):
        return None
    value: Any = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _kind(schema: Mapping[str, Any]) -> str | None:
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [k for k in kind if k != "null"]
        if set(kinds) == {"integer", "number"}:
            return "number"
        return kinds[0] if len(kinds) == 1 else None
    if isinstance(kind, str):
        return kind
    values = [v for v in schema.get("enum", [schema.get("const")]) if v is not None]
    if values and all(isinstance(v, str) for v in values):
        return "string"
    return "object" if "properties" in schema else None


def _fit(value: Any, type_: pa.DataType, where: str) -> Any:
    if value is None:
        return None
    if pa.types.is_string(type_):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if pa.types.is_struct(type_):
        if not isinstance(value, dict):
            raise Unreadable(f"{where} is no object")
        return {f.name: _fit(value.get(f.name), f.type, f"{where}.{f.name}") for f in type_}
    if pa.types.is_list(type_):
        if not isinstance(value, list):
            raise Unreadable(f"{where} is no array")
        return [_fit(inner, type_.value_type, f"{where}[]") for inner in value]
    return _fit_scalar(value, type_, where)


def _fit_scalar(value: Any, type_: pa.DataType, where: str) -> Any:
    if pa.types.is_boolean(type_) and isinstance(value, bool):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if pa.types.is_float64(type_):
            return float(value)
        if pa.types.is_int64(type_) and int(value) == value and int(value) in _INT64:
            return int(value)
    raise Unreadable(f"{where} is no {type_}")
