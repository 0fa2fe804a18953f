"""Inputs that are replaced, overwritten, cut, removed or continued while their rows are read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job_folder import AnyProcess, JobFolder, make_input, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 96  # whole row groups, so that a file can grow behind them
SLOW = {"FAKE_DELAY_SEC": "0.02"}


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    """Two files of one shard each, in three row groups."""
    return make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=48)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    job = make_job(tmp_path_factory.mktemp("whole") / "job", NUM_ROWS, rows_per_shard=48)
    assert job.run().returncode == 0
    return job.content()


def _replace(file: Path) -> None:
    """As a careful program does it: readers keep the old content."""
    new = file.with_suffix(".new")
    make_input(new, NUM_ROWS // 2, prefix="other")
    os.replace(new, file)


def _overwrite(file: Path) -> None:
    """As `cp` does it: readers see both contents."""
    new = file.with_suffix(".new")
    make_input(new, NUM_ROWS // 2, prefix="g0")  # ids of the same length, so it is as long
    file.write_bytes(new.read_bytes())
    new.unlink()


def _cut_the_footer(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _remove(file: Path) -> None:
    file.unlink()


HARMS = [_replace, _overwrite, _cut_the_footer, _remove]


def _harm_under_way(job: JobFolder, harm: Callable[[Path], None]) -> tuple[AnyProcess, bytes]:
    """A run whose first file is harmed while its rows are at work; what the file was."""
    file = job.folder / "input/part-0.parquet"
    data = file.read_bytes()
    run = job.start_run(env=SLOW)
    job.wait_for_answers(10)
    harm(file)
    return run, data


@pytest.mark.parametrize("harm", HARMS)
def test_the_run_stops_and_the_file_put_back_ends_it(
    job: JobFolder, wanted: list[dict[str, Any]], tally: Tally, harm: Callable[[Path], None]
) -> None:
    """No answer about the other content stays."""
    run, data = _harm_under_way(job, harm)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (1, 2), err
    assert "part-0.parquet" in err
    assert "Traceback" not in err
    (job.folder / "input/part-0.parquet").write_bytes(data)
    _check(job, wanted, tally)


@pytest.mark.crash
@pytest.mark.parametrize("wait_sec", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("harm", HARMS[:2])
def test_killed_after_the_change(
    job: JobFolder,
    wanted: list[dict[str, Any]],
    tally: Tally,
    harm: Callable[[Path], None],
    wait_sec: float,
) -> None:
    """The journal of a run that had no time to notice holds nothing of the other content."""
    run, data = _harm_under_way(job, harm)
    time.sleep(wait_sec)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=20)
    tally.injected("SIGKILL")
    (job.folder / "input/part-0.parquet").write_bytes(data)
    _check(job, wanted, tally)


def _check(job: JobFolder, wanted: list[dict[str, Any]], tally: Tally) -> None:
    tally.injected("input changed under way")
    done = job.run()
    assert done.returncode == 0, done.stderr
    tally.check_rows(job.content(), wanted)
    assert job.call("verify", str(job.out)).returncode == 0


def test_a_replaced_file_is_redone_as_a_whole(job: JobFolder, tally: Tally) -> None:
    run, _ = _harm_under_way(job, _replace)
    run.communicate(timeout=60)
    assert job.run().returncode == 2
    done = job.run("--changed", "redo")
    assert done.returncode == 0, done.stderr
    ids = job.table().column("row_id").to_pylist()
    assert [id_.split("-")[0] for id_ in ids] == ["other"] * 48 + ["f1"] * 48
    assert job.call("verify", str(job.out)).returncode == 0
    tally.injected("input changed under way")


def test_a_file_that_grows_is_no_harm(job: JobFolder, tally: Tally) -> None:
    def grow(file: Path) -> None:
        new = file.with_suffix(".new")
        make_input(new, NUM_ROWS // 2 + 7, prefix="f0")
        os.replace(new, file)

    run, _ = _harm_under_way(job, grow)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert job.run().returncode == 0
    assert job.table().num_rows == NUM_ROWS + 7
    assert set(job.generated().values()) == {1}
    assert job.call("verify", str(job.out)).returncode == 0
    tally.injected("input grown under way")
