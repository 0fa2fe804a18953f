"""The batch script as text: what it says, what it refuses, nasty names."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from jobs.slurm import Submission, array_sizes, check_options, finish_script, script
from pipeline.errors import UserError
from tests.helpers.job_folder import JobFolder, make_job


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


def _start(task: Submission, job: JobFolder, **env: str) -> subprocess.Popen[str]:
    """The batch script, started by hand with a task's variables."""
    task.folder.mkdir(parents=True, exist_ok=True)
    task.file.write_text(script(task))
    variables = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    return subprocess.Popen(
        ["bash", str(task.file)],
        env=job._environment() | variables | {"TMPDIR": str(job.folder)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str], code: int = 0) -> str:
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return err


def _stand_in(folder: Path, name: str, text: str) -> str:
    """A PATH on which a command is a script of ours."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_script_runs_as_a_task(tmp_path: Path) -> None:
    job = make_job(tmp_path / "two words", 20)
    task = _submission(job.folder, config=job.config, arguments=("--set", "system=a  'b'"))
    _end(_start(task, job))
    assert job.table().num_rows == 20
    assert not (job.folder / "vlm-batch-7").exists()


def test_several_tasks_of_a_job_go_through_srun(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 20)
    path = _stand_in(tmp_path / "bin", "srun", 'echo "$@" >> "$SRUN_LOG"; "${@:2}"')
    log = tmp_path / "srun.log"
    task = _submission(job.folder, config=job.config, arguments=())
    _end(_start(task, job, PATH=path, SLURM_NTASKS="2", SRUN_LOG=str(log)))
    assert job.table().num_rows == 20
    first, last = log.read_text().splitlines()
    assert first == f"--kill-on-bad-exit=0 bash {task.file} step"
    assert last.startswith("--ntasks-per-node=1 rm -rf ")


@pytest.mark.parametrize(("warned", "requeued"), [(True, ["requeue 6_1"]), (False, [])])
def test_the_time_limit_requeues_and_a_cancellation_does_not(
    tmp_path: Path, warned: bool, requeued: list[str]
) -> None:
    job = make_job(tmp_path / "job", 80)
    path = _stand_in(tmp_path / "bin", "scontrol", 'echo "$@" >> "$SCONTROL_LOG"; exit 1')
    log = tmp_path / "scontrol.log"
    log.touch()
    task = _submission(job.folder, config=job.config, arguments=())
    process = _start(task, job, PATH=path, SCONTROL_LOG=str(log), FAKE_DELAY_SEC="0.03")
    job.wait_for_answers(10)
    if warned:
        process.send_signal(signal.SIGUSR1)
    else:
        for child in psutil.Process(process.pid).children():
            child.terminate()
    assert "run the same command again" in _end(process, 75)
    assert log.read_text().splitlines() == requeued
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}


@pytest.mark.slow
def test_a_warning_leaves_time_for_what_is_in_flight(tmp_path: Path) -> None:
    """An answer that takes longer than the usual grace, and shorter than the warning."""
    job = make_job(tmp_path / "job", 20)
    path = _stand_in(tmp_path / "bin", "scontrol", "exit 1")
    task = _submission(job.folder, config=job.config, arguments=())
    env = {"PATH": path, "FAKE_DELAY_SEC": "10", "FAKE_IN_FLIGHT": "1"}
    process = _start(task, job, **env)
    job.wait_for("leases/*.json")
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    _end(process, 75)
    assert sum(job.generated().values()) == 1
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}


def _staged(job: JobFolder, scratch: Path) -> Submission:
    return _submission(
        job.folder, config=job.config, arguments=(), model=job.folder / "checkpoint",
        scratch=scratch,
    )  # fmt: skip


def test_the_model_is_copied_once_a_node(tmp_path: Path) -> None:
    """Tasks that start together: one copies, the others wait for it."""
    job = make_job(tmp_path / "job", 40)
    task = _staged(job, tmp_path / "scratch")
    copies = tmp_path / "cp.log"
    copy = 'echo "$@" >> "$CP_LOG"; sleep 0.5; exec /bin/cp "$@"'
    path = _stand_in(tmp_path / "bin", "cp", copy)
    tasks = [
        _start(task, job, PATH=path, CP_LOG=str(copies), SLURM_JOB_ID=str(n)) for n in (7, 8, 9)
    ]
    for process in tasks:
        _end(process)
    assert len(copies.read_text().splitlines()) == 1
    assert len(list((tmp_path / "scratch/vlm-batch-models").glob("*/config.json"))) == 1
    assert job.run().returncode == 0, "a copied checkpoint is the same checkpoint"


@pytest.mark.parametrize("copy", ["exit 1", '/bin/cp "$@"; kill -9 $PPID; exit 1'])
def test_a_copy_that_fails_is_not_used(tmp_path: Path, copy: str) -> None:
    """No room on the local disk: the model is read where it is. Killed half way: copied anew."""
    job = make_job(tmp_path / "job", 20)
    task = _staged(job, tmp_path / "scratch")
    path = _stand_in(tmp_path / "bin", "cp", copy)
    _start(task, job, PATH=path).communicate(timeout=60)
    assert not list((tmp_path / "scratch/vlm-batch-models").glob("*.whole"))
    _end(_start(task, job))
    assert job.table().num_rows == 20


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
