"""A run in one process: failing devices, bad rows, growth of the input, refused changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.job_folder import JobFolder, as_json, make_input, make_job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return make_job(tmp_path / "job", 40, rows_per_shard=10)


def test_a_second_run_does_no_work(job: JobFolder) -> None:
    assert job.run().returncode == 0
    before = {part: part.stat().st_mtime_ns for part in job.parts()}
    again = job.run()
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert {part: part.stat().st_mtime_ns for part in job.parts()} == before
    assert set(job.generated().values()) == {1}


def test_rows_stand_in_input_order(job: JobFolder) -> None:
    assert job.run().returncode == 0
    ids = job.table().column("row_id").to_pylist()
    assert ids == sorted(ids)


def test_failed_rows_keep_their_place(job: JobFolder) -> None:
    done = job.run("--json", env={"FAKE_FAIL_ROWS": "f0-00003,f1-00001"})
    assert done.returncode == 0, "a failed row is a state, not a failure of the run"
    assert as_json(done)["status"]["rows"]["failed"] == 2
    failed = [row for row in job.content() if row["status"] == "failed"]
    assert [row["row_id"] for row in failed] == ["f0-00003", "f1-00001"]
    assert {row["error_code"] for row in failed} == {"corrupt_image"}


def test_a_device_error_is_tried_again(job: JobFolder) -> None:
    done = job.run(env={"FAKE_ERROR_AT": "13"})
    assert done.returncode == 0, done.stderr
    assert "attempt failed: the fake device is gone" in done.stderr
    assert set(job.generated().values()) == {1}


def test_a_dead_device_ends_the_run(job: JobFolder) -> None:
    done = job.run(env={"FAKE_ERROR_ALWAYS": "1"})
    assert done.returncode == 1
    assert done.stderr.count("the fake device is gone") >= 3
    assert "Traceback" not in done.stderr
    assert not list((job.out / "leases").iterdir())
    assert job.run().returncode == 0


def test_a_grown_input_gives_new_shards(job: JobFolder) -> None:
    assert job.run().returncode == 0
    before = {part.name: part.read_bytes() for part in job.parts()}
    make_input(job.folder / "input/part-2.parquet", 15, prefix="f2")
    assert job.call("verify", str(job.out)).returncode == 75
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.table().num_rows == 55
    assert {p.name: p.read_bytes() for p in job.parts() if p.name in before} == before
    assert len(job.generated()) == 2 * 55


def test_a_changed_input_is_refused_or_redone(job: JobFolder) -> None:
    assert job.run().returncode == 0
    make_input(job.folder / "input/part-0.parquet", 20, prefix="new")
    refused = job.run()
    assert refused.returncode == 2
    assert "part-0.parquet" in refused.stderr
    assert job.call("verify", str(job.out)).returncode == 1
    assert job.run("--changed", "redo").returncode == 0
    assert job.table().column("row_id").to_pylist()[0] == "new-00000"
    assert job.call("verify", str(job.out)).returncode == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("prompts.caption=Other words.", "prompts.caption"),
        ("generation.temperature=0.7", "generation.temperature"),
        ("generation.seed=5", "generation.seed"),
        ("system=Be brief.", "system"),
        ("input.keep=[]", "input.keep"),
        ("model.dtype=float32", "model.dtype"),
    ],
)
def test_other_settings_are_refused_by_name(job: JobFolder, change: str, field: str) -> None:
    assert job.run().returncode == 0
    refused = job.run("--set", change)
    assert refused.returncode == 2
    assert field in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_another_model_is_refused(job: JobFolder) -> None:
    assert job.run().returncode == 0
    (job.folder / "checkpoint/config.json").write_text('{"model_type": "other"}')
    refused = job.run()
    assert refused.returncode == 2
    assert "model" in refused.stderr


def test_speed_settings_may_change(job: JobFolder) -> None:
    assert job.run(env={"FAKE_KILL_AT": "30"}).returncode != 0
    done = job.run("--set", "engine.decode_slots=4", "--set", "output.rows_per_shard=7")
    assert done.returncode == 0, done.stderr
    assert job.table().num_rows == 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_users_mistake(job: JobFolder) -> None:
    job.out.mkdir()
    job.out.chmod(0o500)
    done = job.run()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
