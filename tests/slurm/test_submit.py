"""Arrays of the fake labeller on a real SLURM: sharing, requeue, time limit, cancel, lost nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.job_folder import FAKE, ROOT, JobFolder, as_json, make_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_ROWS = 160


@pytest.fixture
def job(tmp_path: Path, slurm: str, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    """A job of about 8 s of work; batch jobs inherit the environment."""
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=10)
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "VLM_BATCH_LABELLER": FAKE,
        "FAKE_LOG": str(job.log),
        "FAKE_DELAY_SEC": "0.025",
    }.items():
        monkeypatch.setenv(name, value)
        job.env[name] = value
    return job


def _submit(job: JobFolder, *args: str) -> dict[str, object]:
    options = ("--sbatch", "--mem=100M", *args, "--json")
    told: dict[str, object] = as_json(job.call("submit", str(job.config), *options))
    return told


def _squeue() -> dict[str, str]:
    """State of every job and task that the cluster remembers."""
    told = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-o", "%i %T"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(line.split() for line in told.splitlines())


def _states(array: object) -> list[str]:
    return [state for name, state in _squeue().items() if name.split("_")[0] == str(array)]


def _wait(what: Callable[[], bool], timeout: float = 90) -> None:
    until = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < until, _squeue()
        time.sleep(0.3)


def _ended(array: object) -> bool:
    states = _states(array)
    return bool(states) and not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & set(states)


def _check(job: JobFolder, regenerated: int = 0) -> None:
    verified = job.call("verify", str(job.out))
    assert verified.returncode == 0, verified.stdout
    assert job.table().num_rows == NUM_ROWS
    assert sum(count - 1 for count in job.generated().values()) <= regenerated


def _workers(job: JobFolder) -> set[str]:
    return {line.split(" ", 1)[0] for line in job.log.read_text().splitlines()}


def test_an_array_shares_the_shards_and_is_exported(job: JobFolder) -> None:
    out = job.folder / "answers.parquet"
    told = _submit(job, "--array", "3", "--export", str(out))
    _wait(lambda: _ended(told["finish"]))
    assert _states(told["jobs"][0]) == ["COMPLETED"] * 3  # type: ignore[index]
    assert _states(told["finish"]) == ["COMPLETED"]
    assert out.exists()
    assert len(_workers(job)) == 3
    _check(job)


def test_more_tasks_join_and_some_are_cancelled(job: JobFolder) -> None:
    first = _submit(job, "--array", "1")
    array = first["jobs"][0]  # type: ignore[index]
    job.wait_for_answers(10, timeout=60)
    second = _submit(job, "--array", "3")
    job.wait_for_answers(60, timeout=60)
    subprocess.run(["scancel", f"{array}_0"], check=True)
    _wait(lambda: _ended(second["finish"]))
    assert _states(array) == ["CANCELLED"]
    _check(job)


def test_a_requeued_task_goes_on(job: JobFolder) -> None:
    told = _submit(job, "--array", "1")
    array = told["jobs"][0]  # type: ignore[index]
    job.wait_for_answers(60, timeout=60)
    subprocess.run(["scontrol", "requeue", f"{array}_0"], check=True)
    _wait(lambda: _ended(told["finish"]), 120)
    assert _states(array) == ["COMPLETED"]
    assert len(_workers(job)) == 2
    _check(job)


def test_the_time_limit_requeues_while_work_is_left(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of one minute SLURM's warning comes within 2 or 32 s; the work takes longer."""
    job.env["FAKE_DELAY_SEC"] = "0.13"
    monkeypatch.setenv("FAKE_DELAY_SEC", "0.13")
    told = _submit(job, "--array", "1", "--sbatch", "--time=1")
    _wait(lambda: _ended(told["finish"]), 200)
    _check(job)
    log = next((job.out / "slurm").glob(f"{told['jobs'][0]}_*.log")).read_text()  # type: ignore[index]
    assert "run the same command again" in log


def test_a_lost_node_costs_nothing(job: JobFolder) -> None:
    told = _submit(job, "--array", "2", "--sbatch", "--exclusive")
    job.wait_for_answers(40, timeout=60)
    down = ["scontrol", "update", "nodename=n1", "state=down", "reason=test"]
    subprocess.run(down, check=True)
    time.sleep(2)
    # NOTE: refused when the node has already come back by itself.
    subprocess.run(["scontrol", "update", "nodename=n1", "state=resume"], check=False)
    _wait(lambda: _ended(told["finish"]), 150)
    _check(job, regenerated=2)


def _daemon(slurm: str, name: str) -> int:
    return int((Path(slurm).parent / f"{name}.shpid").read_text())


@pytest.mark.timeout(400)
def test_a_node_that_goes_silent_leaves_two_writers(job: JobFolder, slurm: str) -> None:
    """Its daemon dies, its task lives on and is started again elsewhere: a row is written once."""
    told = _submit(job, "--array", "1", "--sbatch", "--nodelist=n1", "--sbatch", "--nodes=1")
    array = told["jobs"][0]  # type: ignore[index]
    subprocess.run(["scontrol", "update", f"jobid={array}", "reqnodelist="], check=False)
    job.wait_for_answers(20, timeout=60)
    (first,) = _pids(job)
    os.kill(first, signal.SIGSTOP)  # a frozen node: it neither works nor renews its lease
    os.kill(_daemon(slurm, "slurmd-n1"), signal.SIGKILL)
    try:
        second = _submit(job, "--array", "2", "--sbatch", "--nodelist=n0")
        _wait(lambda: len(job.parts()) == NUM_ROWS // 10, 120)
        parts = {part: part.stat() for part in job.parts()}
        os.kill(first, signal.SIGCONT)
        _wait(lambda: not psutil.pid_exists(first), 60)
        assert {part: part.stat() for part in job.parts()} == parts, "the late commit won"
        _wait(lambda: _ended(second["finish"]), 120)
    finally:
        _restart_node(slurm, "n1")
    _check(job, regenerated=2 * 10 + 8)


def _pids(job: JobFolder) -> set[int]:
    """The processes that have answered so far."""
    return {int(line.split(" ", 1)[0]) for line in job.log.read_text().splitlines()}


def _restart_node(slurm: str, node: str) -> None:
    folder = Path(slurm).parent
    log = (folder / f"log/slurmd-{node}.out").open("ab")
    daemon = subprocess.Popen(
        ["slurmd", "-D", "-N", node, "-f", slurm], stdout=log, stderr=log, start_new_session=True
    )
    (folder / f"slurmd-{node}.shpid").write_text(str(daemon.pid))
    told = ["sinfo", "-h", "-N", "-o", "%N %t"]
    _wait(lambda: f"{node} idle" in subprocess.check_output(told, text=True), 60)


def test_a_task_stopped_past_its_lease_and_woken(job: JobFolder) -> None:
    """Its late commit loses; the parts are the other task's, byte for byte."""
    told = _submit(job, "--array", "2")
    job.wait_for_answers(40, timeout=60)
    first = sorted(_pids(job))[0]
    os.kill(first, signal.SIGSTOP)
    _wait(lambda: len(job.parts()) == NUM_ROWS // 10, 120)
    parts = {part: part.read_bytes() for part in job.parts()}
    os.kill(first, signal.SIGCONT)
    _wait(lambda: _ended(told["finish"]), 120)
    assert _states(told["jobs"][0]) == ["COMPLETED"] * 2  # type: ignore[index]
    assert {part: part.read_bytes() for part in job.parts()} == parts
    _check(job, regenerated=2 * 10 + 8)


NODES = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gpus-per-task=1")


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        (("--gpus-per-task=2", "--ntasks=1"), ["0 0", "1 0"]),
        (("--gres=gpu:2",), ["0 0", "1 0"]),
        (NODES, ["0 0", "0 1"]),
    ],
)
def test_one_worker_a_gpu(
    job: JobFolder,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    devices: list[str],
) -> None:
    """Of one node, and of two nodes through srun: each worker's GPU and its task's number."""
    log = job.folder / "devices"
    monkeypatch.setenv("FAKE_DEVICE_LOG", str(log))
    told = _submit(job, "--array", "1", *(part for o in options for part in ("--sbatch", o)))
    _wait(lambda: _ended(told["finish"]))
    seen = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    assert sorted(seen) == devices
    assert len(_workers(job)) == 2
    _check(job)


def test_an_array_larger_than_the_cluster_allows(job: JobFolder) -> None:
    """MaxArraySize is 5 here."""
    told = _submit(job, "--array", "7")
    assert len(told["jobs"]) == 2  # type: ignore[arg-type]
    _wait(lambda: _ended(told["finish"]), 120)
    states = [state for array in told["jobs"] for state in _states(array)]  # type: ignore[attr-defined]
    assert states == ["COMPLETED"] * 7
    _check(job)


def test_status_names_the_tasks(job: JobFolder) -> None:
    told = _submit(job, "--array", "3")
    array = told["jobs"][0]  # type: ignore[index]
    job.wait_for_answers(50, timeout=60)
    status = as_json(job.call("status", str(job.out), "--json"))
    tasks = {worker["slurm_job"] for worker in status["workers"]}
    assert tasks
    assert tasks <= {f"{array}_{number}" for number in range(3)}
    arrays = {found["job"]: found for found in status["slurm"]}
    assert arrays[array]["tasks"] == 3
    assert sum(arrays[array]["states"].values()) == 3
    assert arrays[told["finish"]]["states"] == {"PENDING": 1}
    shown = job.call("status", str(job.out)).stdout
    assert f"SLURM job {array} (3 tasks): " in shown
    assert "rows/s" in shown
    _wait(lambda: _ended(told["finish"]))
    _check(job)
