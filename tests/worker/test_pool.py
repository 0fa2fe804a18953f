"""Several worker processes of one run: shared shards, deaths, restarts, no orphans."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.job_folder import JobFolder, as_json, end, make_job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return make_job(tmp_path / "job", 80, rows_per_shard=10)


def _workers(pid: int, count: int) -> list[psutil.Process]:
    until = time.monotonic() + 20
    while len(found := psutil.Process(pid).children()) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def _gone(processes: list[psutil.Process], timeout: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_two_workers_share_the_shards(job: JobFolder) -> None:
    done = job.run("--workers", "2", "--json", env={"FAKE_DELAY_SEC": "0.01"})
    assert done.returncode == 0, done.stderr
    told = as_json(done)
    assert told["run"]["rows"] == 80
    assert sum(worker["shards"] for worker in told["run"]["workers"]) == 8
    assert len({line.split()[0] for line in job.log.read_text().splitlines()}) == 2
    assert set(job.generated().values()) == {1}


def test_a_dead_worker_is_restarted(job: JobFolder) -> None:
    process = job.start_run("--workers", "2", env={"FAKE_DELAY_SEC": "0.01"})
    victim = _workers(process.pid, 2)[0]
    job.wait_for_answers(30)
    victim.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "died (signal 9)" in err
    assert job.table().num_rows == 80
    assert sum(count - 1 for count in job.generated().values()) <= 1


def test_a_hanging_worker_is_killed_and_the_run_gives_up(job: JobFolder) -> None:
    env = {"FAKE_DELAY_SEC": "60"}
    done = job.run("--workers", "1", "--watchdog", "1", "--set", "retry.attempts=2", env=env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("no progress for 1 s: killed") == 2
    assert job.run().returncode == 0


def test_a_signal_stops_all_workers(job: JobFolder) -> None:
    process = job.start_run("--workers", "2", env={"FAKE_DELAY_SEC": "0.02"})
    workers = _workers(process.pid, 2)
    job.wait_for_answers(20)
    began = time.monotonic()
    assert end(process, signal.SIGTERM) == 75
    assert time.monotonic() - began < 10
    assert _gone(workers, 1)
    assert not list((job.out / "leases").iterdir())
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}


def test_workers_do_not_outlive_their_runner(job: JobFolder) -> None:
    process = job.start_run("--workers", "2", env={"FAKE_DELAY_SEC": "0.05"})
    workers = _workers(process.pid, 2)
    job.wait_for_answers(10)
    end(process, signal.SIGKILL)
    assert _gone(workers, 10)
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}


def test_a_users_mistake_in_a_worker_is_exit_2(job: JobFolder) -> None:
    done = job.run("--workers", "2", env={"VLM_BATCH_LABELLER": "nowhere.py:Fake"})
    assert done.returncode == 2
    assert "no Python file" in done.stderr
    assert "Traceback" not in done.stderr
