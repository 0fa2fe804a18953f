"""Death and failing storage at every named step, then one plain run: nothing lost or doubled."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import signal
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.faults import POINTS
from jobs.verify import verify
from tests.helpers.job_folder import JobFolder, as_json, make_input, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 24
# NOTE: relative addresses, so that a run folder that is copied with its input is the same job.
JOB: dict[str, Any] = {"num_rows": NUM_ROWS, "rows_per_shard": 6, "files": 2,
                       "input": {"path": "input/*.parquet"},
                       "output": {"path": "out", "rows_per_shard": 6}}  # fmt: skip
FIRST_RUN = ("plan.", "manifest.")  # passed only where there is no run folder yet
REDO = ("commit.before_replace", "commit.after_replace")  # passed only by redone shards
SLOW = {"FAKE_DELAY_SEC": "0.05"}  # long enough for a heartbeat


@cache
def _expected(redone: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder) / "job", **JOB)
        if redone:
            _change_input(job)
        done = job.run()
        assert done.returncode == 0, done.stderr
        return job.content()


def _change_input(job: JobFolder) -> None:
    make_input(job.folder / "input/part-0.parquet", NUM_ROWS // 2, prefix="other")


def _args(point: str) -> tuple[str, ...]:
    return ("--changed", "redo") if point in REDO else ()


@cache
def _template(kind: str) -> Path:
    """A job before the run that is to pass a point: `new`, `killed` half way, or `redo`."""
    job = make_job(Path(tempfile.mkdtemp(prefix="crash-")) / "job", **JOB)
    atexit.register(shutil.rmtree, job.folder.parent, ignore_errors=True)
    if kind == "redo":
        assert job.run().returncode == 0
        _change_input(job)
    elif kind == "killed":
        assert job.run(env={"FAKE_KILL_AT": "17"}).returncode == -signal.SIGKILL
    return job.folder


def _prepare(tmp_path: Path, point: str) -> JobFolder:
    """A job of the test's own at the moment before the run that is to pass `point`."""
    kind = "redo" if point in REDO else "new" if point.startswith(FIRST_RUN) else "killed"
    folder = tmp_path / "job"
    shutil.copytree(_template(kind), folder)
    return JobFolder(folder, NUM_ROWS, folder / "job.yaml", folder / "out")


def _env(point: str, action: str, hit: str = "1") -> dict[str, str]:
    env = {"VLM_BATCH_FAULT": f"{point}:{action}:{hit}"}
    return env | (SLOW if point == "lease.heartbeat" else {})


def _finish(job: JobFolder, point: str, tally: Tally) -> int:
    """One plain run, and all is well; returns how many faults there were before it."""
    count = tally.from_log(job)
    done = job.run(*_args(point))
    assert done.returncode == 0, done.stderr
    tally.check_rows(job.content(), _expected(point in REDO))
    with contextlib.chdir(job.folder):
        verdict = verify(str(job.out))
    assert verdict.is_whole, verdict
    leftovers = [p for name in ("tmp", "journal", "leases") for p in (job.out / name).rglob("*")]
    assert not leftovers
    return count


def _regenerated(job: JobFolder) -> int:
    return sum(count - 1 for count in job.generated().values())


@pytest.mark.parametrize("point", POINTS)
def test_kill(tmp_path: Path, tally: Tally, point: str) -> None:
    job = _prepare(tmp_path, point)
    ended = job.run(*_args(point), env=_env(point, "kill"))
    assert ended.returncode == -signal.SIGKILL, f"{point} was not passed: {ended.stderr}"
    assert _finish(job, point, tally) == 1
    assert _regenerated(job) <= (2 if point not in REDO else 2 * NUM_ROWS)


@pytest.mark.crash
@pytest.mark.parametrize("hit", ["2", "4"])
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_later_passage(tmp_path: Path, tally: Tally, point: str, hit: str) -> None:
    job = _prepare(tmp_path, point)
    ended = job.run(*_args(point), env=_env(point, "kill", hit))
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    _finish(job, point, tally)


def test_torn_record(tmp_path: Path, tally: Tally) -> None:
    job = _prepare(tmp_path, "journal.append")
    ended = job.run(env=_env("journal.append", "torn", "4"))
    assert ended.returncode == -signal.SIGKILL
    _finish(job, "journal.append", tally)
    assert _regenerated(job) <= 2


@pytest.mark.parametrize("point", ["journal.append", "journal.sync", "commit.before_write"])
def test_full_disk_is_one_sentence(tmp_path: Path, tally: Tally, point: str) -> None:
    job = _prepare(tmp_path, point)
    ended = job.run(env=_env(point, "enospc", "2+"))
    assert ended.returncode == 1
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr
    _finish(job, point, tally)


@pytest.mark.crash
@pytest.mark.parametrize("action", ["term", "int"])
@pytest.mark.parametrize("point", POINTS)
def test_stopped_at_each_point(tmp_path: Path, tally: Tally, point: str, action: str) -> None:
    """A signal in the middle of each step: the run drains, or has just ended."""
    job = _prepare(tmp_path, point)
    ended = job.run(*_args(point), env=_env(point, action))
    assert ended.returncode in (0, 75), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    _finish(job, point, tally)


@pytest.mark.crash
@pytest.mark.parametrize("action", ["enospc", "eio", "erofs", "edquot", "estale"])
@pytest.mark.parametrize("hit", ["2", "1+"])
@pytest.mark.parametrize("point", POINTS)
def test_failing_storage(tmp_path: Path, tally: Tally, point: str, action: str, hit: str) -> None:
    job = _prepare(tmp_path, point)
    ended = job.run(*_args(point), env=_env(point, action, hit))
    assert ended.returncode in (0, 1, 2, 75), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    _finish(job, point, tally)


def _wait_until_stopped(pid: int) -> None:
    until = time.monotonic() + 20
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until, "never stopped"
        time.sleep(0.02)


def _stop_past_lease_and_wake(tmp_path: Path, point: str, tally: Tally) -> None:
    job = _prepare(tmp_path, point)
    first = job.start_run(*_args(point), env=_env(point, "stop"))
    _wait_until_stopped(first.pid)
    second = job.run(*_args(point))
    assert second.returncode == 0, second.stderr
    before = [(part.name, part.read_bytes()) for part in job.parts()]
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=30)
    assert first.returncode == 0, err
    assert [(part.name, part.read_bytes()) for part in job.parts()] == before
    _finish(job, point, tally)


def test_stopped_past_its_lease_and_woken(tmp_path: Path, tally: Tally) -> None:
    """The late commit loses: the parts are the other process's, byte for byte."""
    _stop_past_lease_and_wake(tmp_path, "commit.before_link", tally)


@pytest.mark.crash
@pytest.mark.parametrize("point", [p for p in POINTS if p != "lease.before_acquire"])
def test_stopped_at_every_step(tmp_path: Path, tally: Tally, point: str) -> None:
    _stop_past_lease_and_wake(tmp_path, point, tally)


def test_status_works_beside_a_dead_worker(tmp_path: Path) -> None:
    job = _prepare(tmp_path, "lease.heartbeat")
    status = as_json(job.call("status", str(job.out), "--json"))
    assert not status["complete"]
    assert [worker["dead"] for worker in status["workers"]] == [True] * len(status["workers"])
    assert status["rows"]["left"] + status["rows"]["ok"] == NUM_ROWS
