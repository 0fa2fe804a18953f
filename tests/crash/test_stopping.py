"""SIGTERM and its like: exit 75 within 10 s, nothing finished is lost; several runs at once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.helpers.job_folder import JobFolder, end, make_job

SLOW = {"FAKE_DELAY_SEC": "0.02"}


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return make_job(tmp_path / "job", 80, rows_per_shard=40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_drains(job: JobFolder, number: int) -> None:
    process = job.start_run(env=SLOW)
    job.wait_for_answers(12)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 5
    assert "run the same command again" in err
    assert not list((job.out / "leases").iterdir())
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}, "a drained answer was generated again"


def test_a_labeller_that_hangs_is_left(job: JobFolder) -> None:
    process = job.start_run(env={"FAKE_DELAY_SEC": "30"})
    job.wait_for("leases/*.json")
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert time.monotonic() - began < 10
    assert "run the same command again" in err
    assert not list((job.out / "leases").iterdir())
    assert job.run().returncode == 0


def test_a_second_signal_exits_at_once(job: JobFolder) -> None:
    process = job.start_run(env={"FAKE_DELAY_SEC": "30"})
    job.wait_for("leases/*.json")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    began = time.monotonic()
    assert end(process, signal.SIGTERM) == 75
    assert time.monotonic() - began < 1


def test_stop_after(job: JobFolder) -> None:
    done = job.run("--stop-after", "1", env=SLOW)
    assert done.returncode == 75
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}


@pytest.mark.parametrize("count", [2, 4])
def test_runs_share_a_folder(tmp_path: Path, count: int) -> None:
    job = make_job(tmp_path / "job", 160, rows_per_shard=10)
    processes = [job.start_run(env={"FAKE_DELAY_SEC": "0.005"}) for _ in range(count)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ends
    assert job.table().num_rows == 160
    assert len(set(job.table().column("row_id").to_pylist())) == 160
    assert set(job.generated().values()) == {1}
    workers = {line.split(" ", 1)[0] for line in job.log.read_text().splitlines()}
    assert len(workers) == count


def test_one_of_two_is_killed(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 160, rows_per_shard=20)
    first, second = (job.start_run(env={"FAKE_DELAY_SEC": "0.005"}) for _ in range(2))
    job.wait_for_answers(60)
    end(first)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert job.table().num_rows == 160
    assert sum(count - 1 for count in job.generated().values()) <= 1


def test_a_reader_sees_whole_files_at_any_moment(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 160, rows_per_shard=10)
    process = job.start_run(env={"FAKE_DELAY_SEC": "0.003"})
    looks = 0
    while process.poll() is None:
        if job.parts():
            ids = job.table().column("row_id").to_pylist()
            assert len(ids) == len(set(ids))
            looks += 1
    assert process.returncode == 0
    assert looks > 5
