"""`retry` does failed rows again, by code, and touches nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.job_folder import JobFolder, as_json, make_job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    job = make_job(tmp_path / "job", 24, rows_per_shard=6)
    assert job.run(env={"FAKE_FAIL_ROWS": "f0-00003,f1-00001"}).returncode == 0
    return job


def test_retry_answers_only_what_failed(job: JobFolder) -> None:
    before = {p.name: p.read_bytes() for p in job.parts()}
    old = {row["row_id"]: row for row in job.table().to_pylist()}
    told = as_json(job.call("retry", str(job.out), "--code", "corrupt_image", "--json"))
    assert told["shards"] == ["shard-00000000", "shard-00000002"]
    assert told["answers"] == {"corrupt_image": 4}
    assert {p.name: p.read_bytes() for p in job.parts()} == before, "nothing is lost meanwhile"
    done = job.run()
    assert done.returncode == 0, done.stderr
    rows = job.table().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        if old[row["row_id"]]["status"] == "ok":
            assert row == old[row["row_id"]]
    assert sum(count - 1 for count in job.generated().values()) == 4
    assert job.call("verify", str(job.out)).returncode == 0


def test_other_codes_stay(job: JobFolder) -> None:
    told = as_json(job.call("retry", str(job.out), "--code", "out_of_memory", "--json"))
    assert told["shards"] == []
    assert "nothing to do" in job.run().stderr


def test_dry_run_plans_nothing(job: JobFolder) -> None:
    text = job.call("retry", str(job.out), "--dry-run").stdout
    assert text == "4 corrupt_image in 2 shards\n"
    assert "nothing to do" in job.run().stderr


def test_an_unknown_code_is_a_mistake(job: JobFolder) -> None:
    refused = job.call("retry", str(job.out), "--code", "bad_luck")
    assert refused.returncode == 2
    assert "corrupt_image" in refused.stderr


def test_a_crash_while_retrying(job: JobFolder) -> None:
    job.call("retry", str(job.out))
    assert job.run(env={"FAKE_KILL_AT": "2"}).returncode == -9
    assert job.run().returncode == 0
    assert {row["status"] for row in job.content()} == {"ok"}
    assert job.call("verify", str(job.out)).returncode == 0
