"""Hosts that cannot see each other at one shard, and wall clocks that jump by hours."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job_folder import JobFolder, end, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 40
HOSTS = ({"FAKE_MACHINE": "a"}, {"FAKE_MACHINE": "b"})
CLOCKS = ("7200,-7200", "0,86400,-86400", "-31536000", "3600,0,-3600,0")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    job = make_job(tmp_path_factory.mktemp("whole") / "job", NUM_ROWS, rows_per_shard=20)
    assert job.run().returncode == 0
    return job.content()


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    """Two shards, leases that go stale after a second."""
    checkpoint = {"lease_sec": 1.0}
    return make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=20, checkpoint=checkpoint)


def _check(job: JobFolder, wanted: list[dict[str, Any]], tally: Tally) -> None:
    tally.check_rows(job.content(), wanted)
    verified = job.call("verify", str(job.out))
    assert verified.returncode == 0, verified.stdout


def test_two_hosts_with_one_lease(
    job: JobFolder, wanted: list[dict[str, Any]], tally: Tally
) -> None:
    """A host that cannot renew its leases works on beside the one that took them over."""
    cut_off = {"VLM_BATCH_FAULT": "lease.heartbeat:eio:1+", "FAKE_DELAY_SEC": "0.04"}
    first = job.start_run(env=HOSTS[0] | cut_off)
    job.wait_for("leases/*.json")
    second = job.start_run(env=HOSTS[1])
    ends = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends
    assert "could not be renewed" in ends[0][1]
    tally.from_log(job)
    tally.injected("two hosts, one lease")
    _check(job, wanted, tally)


@pytest.mark.crash
@pytest.mark.parametrize(
    "point", ["commit.before_build", "commit.before_link", "commit.after_link"]
)
@pytest.mark.parametrize("seconds", ["1.5", "3"])
def test_two_hosts_commit_one_shard(
    job: JobFolder, wanted: list[dict[str, Any]], tally: Tally, point: str, seconds: str
) -> None:
    """Both have the whole shard and come to the commit late: one part is kept."""
    slow = {"VLM_BATCH_FAULT": f"{point}:sleep={seconds}:1+,lease.heartbeat:eio:1+"}
    runs = [job.start_run(env=host | slow) for host in HOSTS]
    ends = [run.communicate(timeout=90) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    tally.injected("two hosts, one lease")
    _check(job, wanted, tally)


@pytest.mark.parametrize(
    "number", [3, *(pytest.param(n, marks=pytest.mark.crash) for n in range(5, 36, 3))]
)
def test_a_host_that_slept_past_its_lease(
    job: JobFolder, wanted: list[dict[str, Any]], tally: Tally, number: int
) -> None:
    """Stopped in the middle of its answers, taken over from elsewhere, woken."""
    first = job.start_run(env=HOSTS[0] | {"FAKE_DELAY_SEC": "0.02"})
    job.wait_for_answers(number)
    first.send_signal(signal.SIGSTOP)
    second = job.run(env=HOSTS[1])
    assert second.returncode == 0, second.stderr
    parts = [part.read_bytes() for part in job.parts()]
    assert end(first, signal.SIGCONT) == 0
    assert [part.read_bytes() for part in job.parts()] == parts
    tally.injected("SIGSTOP")
    _check(job, wanted, tally)


@pytest.mark.parametrize(
    "clock", [CLOCKS[0], *(pytest.param(c, marks=pytest.mark.crash) for c in CLOCKS[1:])]
)
def test_wall_clocks_that_jump(
    job: JobFolder, wanted: list[dict[str, Any]], tally: Tally, clock: str
) -> None:
    """Order, leases and resuming rest on no wall clock."""
    env = {"FAKE_CLOCK": clock, "FAKE_DELAY_SEC": "0.01"}
    killed = job.run(env=env | {"FAKE_KILL_AT": "21"})
    assert killed.returncode == -signal.SIGKILL
    runs = [job.start_run(env=env | host) for host in HOSTS]
    ends = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    status = job.call("status", str(job.out))
    assert status.returncode == 0, status.stderr
    tally.injected("SIGKILL")
    tally.injected("clock jump", 3 * len(clock.split(",")))
    _check(job, wanted, tally)


@pytest.mark.crash
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_at_many_moments(
    tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally, name: str
) -> None:
    """Each run gets a few answers further, and no finished answer is made again."""
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=20)
    for _ in range(9):
        before = sum(job.generated().values())
        run = job.start_run(env={"FAKE_DELAY_SEC": "0.01", "FAKE_IN_FLIGHT": "2"})
        job.wait_for_answers(before + 2)
        run.send_signal(signal.Signals[name])
        _, err = run.communicate(timeout=20)
        assert run.returncode == 75, err
        tally.injected(name)
    assert job.run().returncode == 0
    assert set(job.generated().values()) == {1}
    _check(job, wanted, tally)


@pytest.mark.crash
def test_pauses_of_two_runs(tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally) -> None:
    """Stopped and woken in turns, within the lease and past it."""
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=5, checkpoint={"lease_sec": 0.6})
    runs = [job.start_run(env=host | {"FAKE_DELAY_SEC": "0.03"}) for host in HOSTS]
    until = time.monotonic() + 60
    for turn in range(12):
        run = runs[turn % 2]
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGSTOP)
        time.sleep(0.2 + 0.15 * (turn % 4))
        run.send_signal(signal.SIGCONT)
        tally.injected("SIGSTOP")
        assert time.monotonic() < until
    ends = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    # NOTE: other shards than those of `wanted`, the same rows.
    tally.check_rows(job.content(), wanted)
    assert job.call("verify", str(job.out)).returncode == 0
