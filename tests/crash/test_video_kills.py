"""Videos being decoded while SIGKILL ends workers, the prober or the whole run: no row is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.videos import video

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 24
pytestmark = [pytest.mark.crash, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips that take a while to decode, and a config."""
    folder = tmp_path_factory.mktemp("videos")
    clips = [video(240, 20, 640, 480, options={"bf": str(n % 3)}, gop=240) for n in range(6)]
    names = [f"r{n}" for n in range(NUM_ROWS)]
    # Bytes at an MP4's end change nothing but its digest.
    cells = [clips[n % 6] + b"\0\0\0\x10free" + n.to_bytes(8, "big") for n in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": names, "video": cells}), folder / "clips.parquet")
    config = {
        "model": {"id": "demo"},
        "input": {"path": str(folder / "clips.parquet"), "id": "id", "video": "video"},
        "video": {"num_frames": 8},
        "prompts": {"what": "Describe this image."},
        "generation": {"max_new_tokens": 8},
        "engine": {"workers": 2},
        "checkpoint": {"interval_sec": 0.2},
        "output": {"path": "out", "rows_per_shard": 6},
    }
    (folder / "job.yaml").write_text(json.dumps(config))
    return folder


def _start(job: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs.cli", "run", str(job / "job.yaml"), "--output", str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def _content(out: Path) -> list[tuple[Any, ...]]:
    rows = pq.read_table(out / "data").to_pylist()
    return sorted((row["row_id"], row["status"], row["what"]) for row in rows)


@pytest.fixture(scope="module")
def expected(job: Path) -> list[tuple[Any, ...]]:
    out = job / "undisturbed"
    assert _start(job, out).wait(200) == 0
    found = _content(out)
    assert [status for _, status, _ in found] == ["ok"] * NUM_ROWS
    return found


def _helpers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The run's decoding and measuring processes."""
    found = []
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            modules = {"pipeline.decode_worker", "pipeline.video_probe"}
            if modules & set(child.cmdline()):
                found.append(child)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        pass
    return found


def _victims(process: subprocess.Popen[bytes], rng: random.Random) -> Iterator[psutil.Process]:
    """Helpers while the run lasts, each once."""
    seen: set[int] = set()
    while process.poll() is None:
        fresh = [helper for helper in _helpers(process) if helper.pid not in seen]
        time.sleep(0.2 + rng.random() * 0.6)
        if fresh and process.poll() is None:
            victim = rng.choice(fresh)
            seen.add(victim.pid)
            yield victim


@pytest.mark.parametrize("seed", range(2))
def test_helpers_killed(job: Path, expected: list[tuple[Any, ...]], seed: int) -> None:
    out, kills = job / f"helpers-{seed}", 0
    process = _start(job, out)
    for victim in _victims(process, random.Random(seed)):
        try:
            victim.kill()
            kills += 1
        except psutil.NoSuchProcess:
            pass
        if kills == 4:
            break
    assert process.wait(200) == 0
    assert kills >= 2
    assert _content(out) == expected


@pytest.mark.parametrize("seed", range(2))
def test_the_run_killed(job: Path, expected: list[tuple[Any, ...]], seed: int) -> None:
    out, rng = job / f"run-{seed}", random.Random(seed)
    process = _start(job, out)
    while process.poll() is None and not _helpers(process):
        time.sleep(0.02)
    time.sleep(rng.random() * 3)
    helpers = _helpers(process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child not in helpers:
            child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(helpers, timeout=30)[1], "helpers outlive their run"
    assert _start(job, out).wait(200) == 0
    assert _content(out) == expected
