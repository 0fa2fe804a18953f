"""SIGKILL at random moments, resume, and the run folder is as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.job_folder import JobFolder, end, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 120
ANSWER_SEC = 0.006


def _expected(tmp_path: Path) -> list[dict[str, object]]:
    job = make_job(tmp_path / "whole", NUM_ROWS)
    done = job.run()
    assert done.returncode == 0, done.stderr
    return job.content()


def _kill_at_random(job: JobFolder, rng: random.Random) -> bool:
    """Start a run and kill it, mostly while it works; False when it had ended by itself."""
    answers = sum(job.generated().values())
    process = job.start_run(env={"FAKE_DELAY_SEC": str(ANSWER_SEC)})
    if rng.random() < 0.8:
        while process.poll() is None and sum(job.generated().values()) == answers:
            time.sleep(0.01)
    try:
        process.communicate(timeout=rng.random() * 0.4)
    except subprocess.TimeoutExpired:
        return end(process) == -9
    assert process.returncode == 0
    return False


def _check_visible_files(job: JobFolder) -> None:
    """What a reader sees right now: whole files, no row twice."""
    seen: set[str] = set()
    for part in job.parts():
        ids = pq.read_table(part).column("row_id").to_pylist()
        assert not seen & set(ids)
        seen |= set(ids)


def _kill_and_resume(tmp_path: Path, num_kills: int, seed: int, tally: Tally) -> None:
    rng = random.Random(seed)
    expected = _expected(tmp_path)
    kills = folder = 0
    while kills < num_kills:
        folder += 1
        job = make_job(tmp_path / f"killed-{folder}", NUM_ROWS)
        killed = 0
        while kills + killed < num_kills and _kill_at_random(job, rng):
            killed += 1
            _check_visible_files(job)
        done = job.run()
        assert done.returncode == 0, done.stderr
        tally.injected("SIGKILL", killed)
        tally.check_rows(job.content(), expected)
        assert len(job.generated()) == 2 * NUM_ROWS
        # NOTE: an answer is in the journal before the next one is made: one is lost a kill.
        assert sum(job.generated().values()) - 2 * NUM_ROWS <= killed
        verified = job.call("verify", str(job.out))
        assert verified.returncode == 0, verified.stdout + verified.stderr
        kills += killed


def test_kills_at_random_moments(tmp_path: Path, tally: Tally) -> None:
    _kill_and_resume(tmp_path, num_kills=16, seed=1, tally=tally)


@pytest.mark.crash
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(2, 7))
def test_fifty_kills_at_random_moments(tmp_path: Path, tally: Tally, seed: int) -> None:
    _kill_and_resume(tmp_path, num_kills=50, seed=seed, tally=tally)
