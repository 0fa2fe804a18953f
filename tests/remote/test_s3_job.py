"""Whole jobs with input and run folder on S3, through the command line, on a store's bad days."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("moto", reason="needs moto: pip install 'vlm-batch[dev]'")
pytest.importorskip("flask", reason="needs flask: pip install 'vlm-batch[dev]'")
pytest.importorskip("s3fs", reason="needs s3fs: pip install 'vlm-batch[s3]'")

from jobs.cli import main
from tests.helpers.job_folder import ROOT, JobFolder, as_json, make_job
from tests.helpers.s3_server import S3, environment, s3_server

SCENES = ROOT / "pipeline/demo/data/scenes.parquet"
NUM_SCENES = 6


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import s3fs

    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    server.faults.clear()
    server.requests.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem(use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()


def command(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    line = [sys.executable, "-m", "jobs.cli", *args]
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=100)


def parts(store: Any, run: str) -> list[dict[str, Any]]:
    """All rows of a run folder's parts."""
    names = sorted(store.glob(f"{run}/data/*.parquet"))
    tables = [pq.read_table(io.BytesIO(store.cat_file(name))) for name in names]
    return [row for table in tables for row in table.to_pylist()]


def fake_job(store: Any, tmp_path: Path, run: str, num_rows: int = 40) -> JobFolder:
    """A job of two input files on S3 with its run folder there, answered by the fake labeller."""
    out = {"path": f"s3://{run}", "rows_per_shard": 5}
    job = make_job(tmp_path / "job", num_rows, output=out, checkpoint={"lease_sec": 3})
    for file in (tmp_path / "job/input").iterdir():
        store.put(str(file), f"{run}-in/{file.name}")
    job.config.write_text(
        job.config.read_text().replace(str(tmp_path / "job/input"), f"s3://{run}-in")
    )
    return job


def test_scenes_are_read_and_answered_on_s3(server: S3, store: Any) -> None:
    """The shipped model; pictures, table, journals and parts all on a store that stumbles."""
    scenes = pq.read_table(SCENES).slice(0, NUM_SCENES)
    paths = []
    for number, cell in enumerate(scenes.column("image").to_pylist()):
        data = cell["bytes"] if isinstance(cell, dict) else cell
        paths.append(f"s3://bucket/pictures/{number}.png")
        store.pipe_file(paths[-1], data)
    at = scenes.schema.get_field_index("image")
    table = io.BytesIO()
    pq.write_table(scenes.set_column(at, "image", pa.array(paths)), table)
    store.pipe_file("bucket/scenes/a.parquet", table.getvalue())
    server.fail("GET", "scenes/a.parquet", "SlowDown", 2)
    server.fail("GET", "scenes/a.parquet", "cut")
    server.fail("GET", "pictures/1", "stalled")
    server.fail("GET", "pictures/2", "cut")
    server.fail("GET", "pictures/3", "TooManyRequests")
    server.fail("PUT", "data/shard-00000000", "ServiceUnavailable")
    server.fail("PUT", "data/shard-00000001", "lost")
    server.fail("PUT", "journal/", "InternalError")
    config = str(ROOT / "configs/demo.yaml")
    sets = ["--set", "output.rows_per_shard=3", "--set", f"input.limit={NUM_SCENES}"]
    done = command(
        "run", config, *sets, "--set", "input.path=s3://bucket/scenes/*.parquet",
        "--output", "s3://bucket/runs/scenes", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert as_json(done)["status"]["rows"]["ok"] == NUM_SCENES
    assert not server.faults
    rows = parts(store, "bucket/runs/scenes")
    assert [row["row_id"] for row in rows] == scenes.column("id").to_pylist()
    assert sum(row["caption"] == row["caption_truth"] for row in rows) >= NUM_SCENES - 1


def test_every_command_on_a_run_folder_on_s3(
    server: S3, store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*args: str, code: int = 0) -> Any:
        assert main([*args, "--json"]) == code
        out = capsys.readouterr().out
        return json.loads(out) if out else None

    job = fake_job(store, tmp_path, "bucket/commands")
    run = "s3://bucket/commands"
    assert job.run(env={"FAKE_FAIL_ROWS": "f0-00003"}).returncode == 0
    server.requests.clear()
    assert call("status", run)["rows"]["failed"] == 1
    assert server.count("GET", "/commands/data/shard") == 8, "one look a part"
    assert call("verify", run)["whole"]
    assert call("show", run, "--failures")[0]["row_ids"] == ["f0-00003"]
    call("report", run)
    assert store.exists("bucket/commands/report.html")
    out = tmp_path / "set"
    assert call("export", run, str(out))["rows"] == 40
    assert pq.read_table(out / "data").num_rows == 40
    call("export", run, "s3://bucket/exported/set")
    call("export", run, "s3://bucket/exported/set", code=2)
    call("export", run, "s3://bucket/exported/set", "--force")
    names = [n.removeprefix("bucket/exported/") for n in store.find("bucket/exported")]
    assert names == ["set/README.md", "set/data/train-00000.parquet"]
    assert call("retry", run, "--code", "corrupt_image")["shards"]
    store.pipe_file("bucket/commands/data/shard-00000002.parquet", b"")
    assert call("status", run)["shards"]["damaged"] == ["shard-00000002"]
    assert call("verify", run, "--repair", code=1)["repaired"] == ["shard-00000002"]
    assert job.run().returncode == 0
    verdict = call("verify", run)
    assert verdict["whole"]
    assert verdict["states"] == {"ok": 40}


def test_two_runs_share_a_store_that_stumbles_and_one_is_killed(
    server: S3, store: Any, tmp_path: Path
) -> None:
    """Each kind of request is refused now and then; nothing is lost and nothing is doubled."""
    job = fake_job(store, tmp_path, "bucket/shared")
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        for place in ("plan", "leases", "journal", "data", "manifest", "-in"):
            for kind in ("SlowDown", "TooManyRequests", "lost"):
                server.fail(method, place, kind)
    runs = [job.start_run(env={"FAKE_DELAY_SEC": "0.05"}) for _ in range(2)]
    deadline = time.monotonic() + 60
    while server.count("PUT", "/shared/data/") < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    runs[0].send_signal(signal.SIGKILL)
    runs[0].communicate()
    _, told = runs[1].communicate(timeout=60)
    assert runs[1].returncode == 0, told
    rows = parts(store, "bucket/shared")
    assert len(rows) == len({row["row_id"] for row in rows}) == 40
    server.faults.clear()
    assert main(["verify", "s3://bucket/shared"]) == 0


def test_a_store_that_refuses_is_one_sentence(server: S3, store: Any, tmp_path: Path) -> None:
    job = fake_job(store, tmp_path, "bucket/denied", 10)
    server.fail("PUT", "denied/data", "AccessDenied", 1000)
    done = job.run()
    assert done.returncode == 1
    assert "s3://bucket/denied" in done.stderr
    assert "Traceback" not in done.stderr
