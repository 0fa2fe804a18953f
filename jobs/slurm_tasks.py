"""The SLURM jobs that were submitted for a run folder, and what SLURM says of their tasks.

Best effort, for `status`: a run needs none of it. Knows squeue by its command.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths

FILE = "submitted.jsonl"
NUM_SHOWN = 8  # the newest submissions
PATIENCE_SEC = 10.0


@dataclass
class SlurmArray:
    """One submitted array; `tasks` is 0 for the job that verifies at the end."""

    job: str
    tasks: int
    states: dict[str, int] = field(default_factory=dict)  # tasks by state, where SLURM knows them


def remember(folder: Path, job: str, tasks: int) -> None:
    """Note a submission in the run folder's `slurm/`."""
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"job": job, "tasks": tasks}) + "\n")


def read_arrays(paths: RunPaths) -> list[SlurmArray]:
    """The newest submissions with their tasks' states; empty for a job without any."""
    folder = paths.local(paths.slurm_folder)
    if folder is None or not (folder / FILE).exists():
        return []
    arrays = []
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines()[-NUM_SHOWN:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values: dict[str, Any] = json.loads(line)
            arrays.append(SlurmArray(values["job"], values["tasks"]))
    states = _states([array.job for array in arrays])
    for array in arrays:
        array.states = dict(states.get(array.job, {}))
    return arrays


def _states(jobs: list[str]) -> dict[str, Counter[str]]:
    """Tasks by state of each job."""
    found: dict[str, Counter[str]] = {}
    if not jobs or shutil.which("squeue") is None:
        return found
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%F %T", "-j", ",".join(jobs)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SEC)
    except (OSError, subprocess.SubprocessError):
        return found
    for line in told.stdout.splitlines():
        job, _, state = line.partition(" ")
        found.setdefault(job, Counter())[state] += 1
    return found
