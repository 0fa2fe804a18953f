"""A job opened for work: its config, run folder, manifest, plan and input, checked against another.

What a worker, a dry run and a validation share. Knows no worker and loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.commit import pending_shards
from jobs.config import JobConfig
from jobs.fingerprint import Fingerprint, checkpoint_identity, fingerprint
from jobs.manifest import Manifest, check_same_job, open_manifest, read_manifest
from jobs.paths import RunPaths
from jobs.plan import Plan, grow_plan
from jobs.table import output_schema
from jobs.versions import at_version
from pipeline.models.checkpoint import Checkpoint
from pipeline.prompts import prompt_columns
from pipeline.sources import open_source


@dataclass(frozen=True)
class Inputs:
    """What a config leads to, looked at and not yet written anywhere."""

    config: JobConfig
    checkpoint: Checkpoint
    fingerprint: Fingerprint
    source: Any  # pipeline.sources.Source
    files: list[Any]
    schema: pa.Schema  # of the output

    @classmethod
    def open(cls, config: JobConfig) -> Inputs:
        """Look at checkpoint and input. Raises: UserError."""
        checkpoint = Checkpoint.open(config.model)
        source = open_config_source(config)
        files = list(source.files())
        schema = source.schema()
        return cls(
            config=config,
            checkpoint=checkpoint,
            fingerprint=fingerprint(config, model_identity(checkpoint)),
            source=source,
            files=files,
            schema=output_schema(config, schema),
        )

    @property
    def num_rows(self) -> int:
        total: int = sum(file.num_rows for file in self.files)
        limit = self.config.input.limit
        return total if limit is None else min(total, limit)

    def check_run_folder(self) -> bool:
        """Whether the run folder exists. Raises: UserError when it belongs to another job."""
        paths = RunPaths(self.config.output.path)
        manifest = read_manifest(paths)
        if manifest is not None:
            check_same_job(paths, manifest, self.config, self.fingerprint)
        return manifest is not None


@dataclass(frozen=True)
class Job:
    """A run folder with work in it."""

    config: JobConfig
    paths: RunPaths
    manifest: Manifest
    plan: Plan
    source: Any
    schema: pa.Schema

    @classmethod
    def open(cls, config: JobConfig, *, changed: str = "refuse", new_version: bool = False) -> Job:
        """Make or join the run folder, and plan the rows that no shard holds yet.

        `new_version`: where the folder holds answers of other settings, work beside them.
        Raises: UserError.
        """
        inputs = Inputs.open(config)
        if new_version:
            config = at_version(config, inputs.fingerprint)
        paths = RunPaths(config.output.path)
        paths.storage.check_writable()
        manifest = open_manifest(
            paths,
            config,
            inputs.fingerprint,
            model=describe_model(inputs.checkpoint),
            output_schema=inputs.schema.to_string(),
        )
        plan = grow_plan(
            paths,
            inputs.files,
            config.output.rows_per_shard,
            limit=config.input.limit,
            changed=changed,
            still_holds=inputs.source.still_holds,
        )
        return cls(config, paths, manifest, plan, inputs.source, inputs.schema)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def num_rows_left(self) -> int:
        """Rows of shards that have no part yet; one listing."""
        return sum(shard.num_rows for shard in pending_shards(self.paths, self.plan))


def open_config_source(config: JobConfig) -> Any:
    """The config's input with the columns that prompts, messages and output need."""
    columns = dict.fromkeys((*config.input.keep, *prompt_columns(config)))
    return open_source(config.input, columns=tuple(columns))


def model_identity(checkpoint: Checkpoint) -> Mapping[str, str] | str:
    """What of the model counts for the fingerprint: the commit, or the folder's content."""
    if checkpoint.revision is not None:
        return f"{checkpoint.id}@{checkpoint.revision}"
    return checkpoint_identity(checkpoint.folder)


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """For the manifest and for cards."""
    told = {"id": checkpoint.id, "revision": checkpoint.revision}
    architectures = checkpoint.config.get("architectures")
    return told | {"architectures": architectures} if architectures else told
