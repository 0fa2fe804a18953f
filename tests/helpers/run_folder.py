"""Small pieces of a job for tests of `jobs/`: a config, input files, answers, a whole commit.

Needs no model and no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from jobs.commit import commit_shard
from jobs.config import JobConfig
from jobs.paths import RunPaths
from jobs.plan import Shard
from jobs.table import build_table, output_schema
from pipeline.rows import Answer, RequestKey

SHARD = Shard("shard-00000000", "in.parquet", 0, 5, "f0")


@dataclass(frozen=True)
class File:
    """An input file as the plan sees it."""

    path: str
    num_rows: int
    fingerprint: str = "f0"
    num_bytes: int = 0


class Kept(NamedTuple):
    """A row as the table sees it."""

    row_id: str
    columns: tuple[Any, ...] = ()


def make_config(**over: Mapping[str, Any]) -> JobConfig:
    """A minimal config; keyword arguments replace or extend its sections."""
    values: dict[str, Any] = {
        "model": {"id": "demo"},
        "input": {"path": "in.parquet"},
        "prompts": {"caption": "Describe."},
        "output": {"path": "out"},
    }
    for key, value in over.items():
        is_section = isinstance(value, dict) and key in values and key != "prompts"
        values[key] = {**values[key], **value} if is_section else value
    return JobConfig.model_validate(values)


def answer(shard: str, row: int, prompt: str = "caption", text: str | None = None) -> Answer:
    """An answer that tells where it belongs."""
    return Answer(
        RequestKey(shard, row, prompt), text or f"{shard} {row} {prompt}", "stop", 10, 4, 3
    )


def shard_table(shard: Shard, config: JobConfig | None = None, text: str = "") -> pa.Table:
    """The table of a shard of which each row is answered."""
    config = config or make_config()
    answers = {
        (i, name): answer(shard.id, i, name, text and f"{text} {i}")
        for i in range(shard.num_rows)
        for name in config.prompt_names()
    }
    made_by = dict.fromkeys(answers, "a1")
    rows = [Kept(f"{shard.path}:{shard.start + i}") for i in range(shard.num_rows)]
    return build_table(output_schema(config, None), rows, answers, made_by)


def commit(paths: RunPaths, attempt: str, shard: Shard = SHARD) -> bool:
    """One attempt at a whole shard, each row answered; whether it won."""
    table = shard_table(shard, text=attempt)
    return commit_shard(paths, shard, table, attempt=attempt, fingerprint="fp")


def tree(paths: RunPaths, folder: str) -> list[str]:
    """All files under a folder of a local run folder."""
    root = paths.local(folder)
    assert root is not None
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
