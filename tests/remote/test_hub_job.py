"""A job that reads a dataset of the hub and puts its answers there, on the hub's busy days."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.hub_standin import Hub, run_hub
from tests.helpers.job_folder import ROOT, JobFolder, make_job

NUM_ROWS = 30


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with run_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def job(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A finished job over `o/words`; its input was read while the hub was busy."""
    folder = tmp_path_factory.mktemp("job")
    job = make_job(folder, NUM_ROWS, rows_per_shard=10)
    data = hub.root / "datasets/o/words/data"
    data.mkdir(parents=True)
    for file in (folder / "input").iterdir():
        file.rename(data / f"train-{file.name}")
    source = {"source": "hf", "path": "o/words", "id": "id", "image": None, "keep": ["url"]}
    config = yaml.safe_load(job.config.read_text()) | {"input": source}
    job.config.write_text(yaml.safe_dump(config))
    job.env |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_stand_in",
    }
    hub.fail("GET", "/api/datasets/o/words", 429, 2, **{"retry-after": "0"})
    hub.fail("GET", "/resolve/", 503)
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert not hub.faults
    return job


def test_rows_of_the_hub_are_answered(job: JobFolder) -> None:
    rows = job.table().to_pylist()
    assert len({row["row_id"] for row in rows}) == NUM_ROWS
    told = json.loads(job.call("verify", str(job.out), "--json").stdout)
    assert told["whole"]
    assert told["rows_input"] == NUM_ROWS


def _push(job: JobFolder, to: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`export --to`, without long pauses."""
    code = (
        "import sys, jobs.hub_push as push; push.FIRST_DELAY_SEC = 0.01\n"
        "from jobs.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, "export", str(job.out), "--to", to, "--json", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **job.env}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=100)


def test_answers_go_back_to_the_hub(job: JobFolder, hub: Hub) -> None:
    hub.fail("POST", "/api/repos/create", 429, **{"retry-after": "0"})
    hub.fail("POST", "/preupload/", 503)
    hub.fail("PUT", "/lfs/", 500)
    hub.fail("POST", "/commit/", 429, 2)
    hub.fail("POST", "/commit/", 412)
    done = _push(job, "hf://datasets/me/answers")
    assert done.returncode == 0, done.stderr
    assert not hub.faults
    told = json.loads(done.stdout)
    assert (told["rows"], told["commit"]) == (NUM_ROWS, hub.commit)
    folder = hub.root / "datasets/me/answers"
    assert pq.read_table(folder / "data").num_rows == NUM_ROWS
    assert "configs" in (folder / "README.md").read_text()
    assert _loaded(job, "me/answers")[0] == NUM_ROWS


def _loaded(job: JobFolder, name: str) -> Any:
    """(rows, first caption), read as anybody would."""
    code = (
        "import datasets, json, sys; d = datasets.load_dataset(sys.argv[1], split='train')\n"
        "print(json.dumps([d.num_rows, d[0]['caption']]))"
    )
    line = [sys.executable, "-c", code, name]
    done = subprocess.run(line, env={**os.environ, **job.env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_data_there_is_replaced_only_when_asked(job: JobFolder, hub: Hub) -> None:
    folder = hub.root / "datasets/me/full"
    (folder / "data").mkdir(parents=True)
    (folder / "data/train-00007.parquet").write_bytes(b"old")
    (folder / "notes.txt").write_text("stay")
    done = _push(job, "hf://datasets/me/full")
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert _push(job, "hf://datasets/me/full", "--force").returncode == 0
    assert sorted(p.name for p in (folder / "data").iterdir()) == ["train-00000.parquet"]
    assert (folder / "notes.txt").exists()


def test_a_hub_that_refuses(job: JobFolder, hub: Hub) -> None:
    hub.fail("POST", "/api/repos/create", 401)
    done = _push(job, "hf://datasets/me/denied")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    done = _push(job, "hf://me/denied")
    assert done.returncode == 2
    assert "hf://datasets/OWNER/NAME" in done.stderr


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("parquet", "hf://datasets/o/words/data/*.parquet"),
        ("hf", "hf://datasets/o/words"),
        ("hf", "hf://datasets/o/words@main"),
    ],
)
def test_addresses_of_the_hub(
    job: JobFolder, hub: Hub, tmp_path: Path, source: str, path: str
) -> None:
    hub.fail("GET", "/api/datasets/o/words", 503)
    hub.fail("GET", "/resolve/", 429)
    done = job.run(
        "--set", f"input.source={source}", "--set", f"input.path={path}",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out/data").num_rows == NUM_ROWS
    assert not hub.faults
