"""The options of a scrontab as SLURM's own parser reads them; Debian ships no scrontab command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs.schedule import Schedule, units


def test_slurm_reads_every_option(
    slurm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "two words; 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    schedule = Schedule(folder / "my job.yaml", "6h", folder / "my log.txt")
    text = units(schedule, "scrontab", ("--mem=10M", "--time=5", "--comment=two words"))
    options = [line for line in text.splitlines() if line.startswith("#SCRON ")]
    script = [line.replace("#SCRON", "#SBATCH", 1) for line in options]
    body = "pwd; echo $SLURM_JOB_NAME; scontrol show job $SLURM_JOB_ID"
    file = folder / "script.sh"
    file.write_text("\n".join(["#!/bin/sh", *script, body, ""]))
    done = subprocess.run(["sbatch", "--wait", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = (folder / "my log.txt").read_text()
    assert told.splitlines()[:2] == [str(folder), "vlm-batch-my-job"]
    assert "Comment=two words" in told
