"""The manifest: the one job that a run folder belongs to.

Written once, exclusively, by whoever comes first; every later run is compared with it. Input files
stand in `plan/`, because they may grow. Knows nothing of shards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.config import JobConfig, config_from_values
from jobs.damage import RESTORE, FileDamaged
from jobs.faults import fault
from jobs.fingerprint import Fingerprint, difference
from jobs.paths import RunPaths
from pipeline.errors import UserError

SCHEMA_VERSION = 1
DIGEST = "digest"
PACKAGES = (
    "vlm-batch",
    "torch",
    "transformers",
    "tokenizers",
    "pyarrow",
    "numpy",
    "pillow",
    "triton",
)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    config: dict[str, Any]  # resolved, secrets as ${NAME}
    fingerprint: str
    fields: dict[str, str]  # the fingerprint by field
    output_schema: str = ""  # the parts' Arrow schema, for people
    model: dict[str, Any] = field(default_factory=dict)  # id, revision, commit
    created: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def job_config(self) -> JobConfig:
        """The config that the run folder was made with."""
        return config_from_values(self.config)


def open_manifest(
    paths: RunPaths,
    config: JobConfig,
    fingerprint: Fingerprint,
    *,
    model: Mapping[str, Any] | None = None,
    output_schema: str = "",
) -> Manifest:
    """The run folder's manifest, made when there is none.

    Raises: UserError when the folder belongs to another job, naming the fields.
    """
    found = read_manifest(paths)
    if found is None:
        manifest = Manifest(
            config=config.resolved(),
            fingerprint=fingerprint.digest,
            fields=dict(fingerprint.fields),
            output_schema=output_schema,
            model=dict(model or {}),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            packages=package_versions(),
        )
        fault("manifest.before_write")
        if paths.storage.write_exclusive(paths.manifest, _encode(manifest)):
            fault("manifest.after_write")
            return manifest
        found = read_manifest(paths)
        if found is None:
            raise UserError(f"{paths.url(paths.manifest)} was deleted while this run started.")
    check_same_job(paths, found, config, fingerprint)
    return found


def read_manifest(paths: RunPaths) -> Manifest | None:
    """None when the folder is no run folder yet. Raises: UserError when it cannot be understood."""
    try:
        data = paths.storage.read(paths.manifest)
    except FileNotFoundError:
        return None
    where = paths.url(paths.manifest)
    try:
        values = json.loads(data)
        version = values["schema_version"]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{where} was written by a newer vlm-batch (schema version {version}, this one "
                f"knows {SCHEMA_VERSION}): update vlm-batch."
            )
        manifest = Manifest(**{k: v for k, v in values.items() if k != DIGEST})
        if data != _encode(manifest):
            raise ValueError("its digest does not hold")
    except (ValueError, KeyError, TypeError) as error:
        raise FileDamaged(where, "is damaged", RESTORE) from error
    return manifest


def _encode(manifest: Manifest) -> bytes:
    """The file's bytes; its last key proves the others."""
    values = asdict(manifest)
    text = json.dumps(values, sort_keys=True)
    values[DIGEST] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def require_manifest(paths: RunPaths) -> Manifest:
    """Raises: UserError when the folder is no run folder."""
    manifest = read_manifest(paths)
    if manifest is None:
        raise UserError(f"{paths.root} is no run folder: it has no {paths.manifest}.")
    return manifest


def check_same_job(
    paths: RunPaths, manifest: Manifest, config: JobConfig, fingerprint: Fingerprint
) -> None:
    """Raises: UserError naming what differs."""
    fields = difference(manifest.fields, fingerprint.fields)
    if not fields:
        return
    new = config.resolved()
    told = [_tell(name, manifest.config, new) for name in fields[:3]]
    more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
    raise UserError(
        f"{paths.root} holds answers of other settings: {', '.join(told)}{more}. Put the old "
        "settings back, choose another output.path, or run with --new-version to answer beside "
        "them."
    )


def package_versions() -> dict[str, str]:
    """Versions of what can be of interest later; loads none of them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _tell(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = _get(old, name), _get(new, name)
    if before == after:
        return name
    return f"{name} was {_short(before)} and is {_short(after)}"


def _get(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return list(values) if isinstance(values, Mapping) else values


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
