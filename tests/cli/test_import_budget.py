"""Commands that start no engine load no torch: proved in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.job_folder import ROOT, JobFolder, make_job

HEAVY = ("torch", "transformers", "triton", "datasets")
PROBE = """
import json, sys
from jobs.cli import main
code = main(sys.argv[1:])
heavy = [name for name in {heavy} if name in sys.modules]
print(json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    job = make_job(tmp_path_factory.mktemp("imports") / "job", 10)
    assert job.run().returncode == 0
    return job


def _probe(*args: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *args],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    return code, heavy


def test_help_loads_no_torch() -> None:
    assert _probe("--help") == (0, [])


@pytest.mark.parametrize("command", ["status", "verify", "show", "report"])
def test_commands_on_a_run_folder_load_no_torch(command: str, job: JobFolder) -> None:
    assert _probe(command, str(job.out)) == (0, [])


@pytest.mark.parametrize("command", ["schema", "models", "doctor"])
def test_commands_without_a_folder_load_no_torch(command: str) -> None:
    assert _probe(command)[1] == []


def test_export_loads_no_torch(job: JobFolder, tmp_path: Path) -> None:
    assert _probe("export", str(job.out), str(tmp_path / "out.parquet")) == (0, [])


def test_plan_and_validate_load_no_torch(job: JobFolder) -> None:
    assert _probe("plan", str(job.config))[1] == []
    assert _probe("validate", str(job.config))[1] == []
