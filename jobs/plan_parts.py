"""The plan's parts as files: numbered, made exclusively, each proved by its last line.

Knows records (plain dictionaries), not what they mean.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.damage import RESTORE, FileDamaged
from jobs.faults import fault
from jobs.paths import RunPaths
from jobs.storage import StorageError

_PART = re.compile(r"part-(\d+)\.jsonl")


def read_parts(paths: RunPaths) -> Iterator[list[dict[str, Any]]]:
    """The records of each part, in order. Raises: FileDamaged when one is lost or damaged."""
    for number in _part_numbers(paths):
        yield _read_part(paths, number)


def _part_numbers(paths: RunPaths) -> list[int]:
    matches = (_PART.fullmatch(name) for name in paths.storage.names(paths.plan_folder))
    numbers = sorted(int(match[1]) for match in matches if match is not None)
    if numbers != list(range(len(numbers))):
        where = paths.url(paths.plan_folder)
        raise FileDamaged(where, f"has lost a part (it has {numbers})", RESTORE)
    return numbers


def write_part(paths: RunPaths, number: int, records: Sequence[dict[str, Any]]) -> bool:
    """Make a part; False when another process has made one of this number."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    body = "".join(f"{line}\n" for line in lines).encode()
    fault("plan.before_write")
    made = paths.storage.write_exclusive(paths.plan_part(number), body + _end(body))
    fault("plan.after_write")
    return made


def _end(body: bytes) -> bytes:
    """The last line of a part, which proves the others."""
    end = {"kind": "end", "lines": body.count(b"\n"), "crc32": zlib.crc32(body)}
    return json.dumps(end).encode() + b"\n"


def _read_part(paths: RunPaths, number: int) -> list[dict[str, Any]]:
    name = paths.plan_part(number)
    try:
        data = paths.storage.read(name)
    except FileNotFoundError as error:
        raise StorageError(f"{name} went away while it was read") from error
    body = data[: data.rstrip(b"\n").rfind(b"\n") + 1]
    try:
        if data != body + _end(body):
            raise ValueError("its checksum does not hold")
        records: list[dict[str, Any]] = [json.loads(line) for line in body.splitlines()]
    except ValueError as error:
        raise FileDamaged(paths.url(name), f"is damaged ({error})", RESTORE) from error
    return records
