"""Answers of new settings beside those of old ones: `output.path`, then `output.path/v2`, `/v3` ….

Each version is a run folder of its own with its own manifest, so that nothing is ever mixed.
Knows no worker.
"""

from __future__ import annotations

from itertools import count

from jobs.config import JobConfig
from jobs.fingerprint import Fingerprint, difference
from jobs.manifest import read_manifest
from jobs.paths import RunPaths


def version_path(root: str, number: int) -> str:
    """The run folder of a version; the first is the root itself."""
    return root if number == 1 else f"{root.rstrip('/')}/v{number}"


def at_version(config: JobConfig, fingerprint: Fingerprint) -> JobConfig:
    """The config in the version that has its fingerprint, or in the first that is not there yet."""
    for number in count(1):
        path = version_path(config.output.path, number)
        manifest = read_manifest(RunPaths(path))
        if manifest is None or not difference(manifest.fields, fingerprint.fields):
            return _moved(config, path)
    raise AssertionError("unreachable")


def _moved(config: JobConfig, path: str) -> JobConfig:
    output = config.output.model_copy(update={"path": path})
    references = {k: v for k, v in config.env_references.items() if k != "output.path"}
    return config.model_copy(update={"output": output, "env_references": references})
