"""Rows that kill or hang their worker end as failed with `worker_crash`; others are answered."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.job_folder import JobFolder, make_job

DEADLY = ("f0-00007", "f1-00009")


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return make_job(tmp_path / "job", 40, rows_per_shard=10)


def _check(job: JobFolder, crashed: tuple[str, ...]) -> None:
    rows = job.content()
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["row_id"] for row in failed] == list(crashed)
    assert {row["error_code"] for row in failed} <= {"worker_crash"}
    assert sum(row["status"] == "ok" for row in rows) == job.num_rows - len(crashed)
    verified = job.call("verify", str(job.out))
    assert verified.returncode == 0, verified.stdout


def test_rows_that_kill_are_isolated_in_one_run(job: JobFolder) -> None:
    done = job.run("--workers", "2", env={"FAKE_KILL_ROWS": ",".join(DEADLY)})
    assert done.returncode == 0, done.stderr
    assert "died (signal 9)" in done.stderr
    _check(job, DEADLY)
    assert set(job.generated().values()) == {1}, "a finished answer was generated again"


@pytest.mark.slow
def test_a_row_that_hangs_is_isolated(job: JobFolder) -> None:
    env = {"FAKE_HANG_ROWS": DEADLY[0]}
    done = job.run("--workers", "1", "--watchdog", "3", env=env)
    assert done.returncode == 0, done.stderr
    assert "made no progress for 3 s: killed" in done.stderr
    _check(job, DEADLY[:1])


def test_rows_that_kill_the_run_itself_are_isolated_over_runs(job: JobFolder) -> None:
    codes = []
    while not codes or codes[-1]:
        codes.append(job.run(env={"FAKE_KILL_ROWS": DEADLY[0]}).returncode)
        assert len(codes) < 20
    assert set(codes[:-1]) == {-signal.SIGKILL}
    _check(job, DEADLY[:1])


def test_retry_answers_a_row_that_was_given_up(job: JobFolder) -> None:
    assert job.run("--workers", "1", env={"FAKE_KILL_ROWS": DEADLY[0]}).returncode == 0
    assert job.call("retry", str(job.out), "--code", "worker_crash").returncode == 0
    assert job.run().returncode == 0
    _check(job, ())
