"""The batch script as text: what it says, what it refuses, nasty names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs.slurm import Submission, array_sizes, check_options, finish_script, script
from pipeline.errors import UserError
from tests.helpers.job_folder import make_job


def _submission(folder: Path, **changes: object) -> Submission:
    values = {
        "config": folder / "job.yaml", "arguments": ("--set", "system=Be $brief; 'now'"),
        "output": folder / "out", "tasks": 4, "options": ("--partition=gpu", "--gpus=1"),
    } | changes  # fmt: skip
    return Submission(**values)  # type: ignore[arg-type]


def _check_syntax(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_script_is_bash_whatever_the_names(nasty_folder: Path) -> None:
    (nasty_folder / "model").mkdir()
    task = _submission(nasty_folder, model=nasty_folder / "model", export_to=nasty_folder / "x")
    _check_syntax(script(task))
    _check_syntax(finish_script(task))


def test_the_script_runs_as_a_task(tmp_path: Path) -> None:
    """The same script, run by hand with a task's variables."""
    job = make_job(tmp_path / "two words", 20)
    task = _submission(job.folder, config=job.config, arguments=("--set", "system=a  'b'"))
    env = job._environment() | {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", script(task)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert job.table().num_rows == 20
    assert not (tmp_path / "vlm-batch-7").exists()


def test_the_script_stages_the_model_once(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 20)
    task = _submission(
        job.folder, config=job.config, arguments=(), model=job.folder / "checkpoint",
        scratch=tmp_path / "scratch",
    )  # fmt: skip
    env = job._environment() | {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", script(task)], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    copies = list((tmp_path / "scratch/vlm-batch-models").glob("*/config.json"))
    assert len(copies) == 1
    assert job.run().returncode == 0, "a copied checkpoint is the same checkpoint"


def test_the_header_holds_the_options(tmp_path: Path) -> None:
    text = script(_submission(tmp_path))
    for line in ("--partition=gpu", "--gpus=1", "--requeue", "--signal=B:USR1@60"):
        assert f"#SBATCH {line}\n" in text
    finish = finish_script(_submission(tmp_path))
    assert "--gpus" not in finish
    assert "--partition=gpu" in finish


@pytest.mark.parametrize("option", ["--array=3", "--signal=USR2@9", "partition=gpu", "-a 3"])
def test_options_that_would_break_it_are_refused(option: str) -> None:
    with pytest.raises(UserError):
        check_options([option])


def test_an_array_larger_than_the_cluster_allows_is_several() -> None:
    assert array_sizes(2500, 1001) == [1001, 1001, 498]
    assert array_sizes(64, 1001) == [64]
    assert array_sizes(1001, 1001) == [1001]


def test_dry_run_prints_and_writes_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 20)
    done = job.call("submit", str(job.config), "--array", "8", "--sbatch", "--qos=low", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --qos=low" in done.stdout
    assert not job.out.exists()


def test_without_slurm_submit_is_a_mistake(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 20)
    done = job.call("submit", str(job.config), env={"PATH": "/nowhere"})
    assert done.returncode == 2
    assert "no sbatch" in done.stderr
