"""The shipped model, drained, killed and resumed: the answers are those of a run in peace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.job_folder import ROOT
from tests.helpers.tally import Tally

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(500)]

SETS = ("input.limit=16", "output.rows_per_shard=8", "generation.max_new_tokens=16",
        "checkpoint.interval_sec=1", "engine.decode_slots=4", "checkpoint.lease_sec=3")  # fmt: skip


class Demo:
    """`vlm-batch run configs/demo.yaml` into a folder, as a user starts it."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cli", *args]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)

    def start_run(self, *args: str) -> subprocess.Popen[str]:
        sets = [part for value in SETS for part in ("--set", value)]
        return self.start("run", "configs/demo.yaml", "--output", str(self.out), *sets, *args)

    def run(self, *args: str) -> tuple[int, str]:
        process = self.start_run(*args)
        _, err = process.communicate(timeout=240)
        return process.returncode, err

    def wait_for_answers(self, process: subprocess.Popen[str], num_bytes: int) -> None:
        """Until the journals hold more than their heads."""
        until = time.monotonic() + 120
        while process.poll() is None and self._journaled() < num_bytes:
            assert time.monotonic() < until
            time.sleep(0.05)

    def _journaled(self) -> int:
        total = 0
        for path in self.out.glob("journal/*/*.journal"):
            total += path.stat().st_size if path.exists() else 0
        return total

    def content(self) -> list[dict[str, Any]]:
        tables = [pq.read_table(part) for part in sorted(self.out.glob("data/*.parquet"))]
        rows = pa.concat_tables(tables).to_pylist()
        for row in rows:
            for meta in row["meta"].values():
                meta.pop("attempt")
                meta.pop("num_cached_tokens", None)
                meta.pop("cached_tokens", None)
        return rows

    def is_whole(self) -> bool:
        verified = self.start("verify", str(self.out))
        told, _ = verified.communicate(timeout=60)
        return verified.returncode == 0 and "whole: every row" in told


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    demo = Demo(tmp_path_factory.mktemp("peace") / "out")
    code, err = demo.run()
    assert code == 0, err
    return demo.content()


def _check(demo: Demo, wanted: list[dict[str, Any]], tally: Tally) -> None:
    code, err = demo.run()
    assert code == 0, err
    tally.check_rows(demo.content(), wanted)
    assert demo.is_whole()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_drains(
    tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally, name: str
) -> None:
    demo = Demo(tmp_path / "out")
    process = demo.start_run()
    demo.wait_for_answers(process, 2000)
    began = time.monotonic()
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 10
    assert not list((demo.out / "leases").iterdir())
    tally.injected(name)
    _check(demo, wanted, tally)


def test_a_signal_while_the_model_is_loaded(
    tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally
) -> None:
    demo = Demo(tmp_path / "out")
    process = demo.start_run()
    until = time.monotonic() + 60
    while not list(demo.out.glob("leases/*.json")):
        assert time.monotonic() < until
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 10
    tally.injected("SIGTERM")
    _check(demo, wanted, tally)


def test_killed_twice_and_resumed(
    tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally
) -> None:
    demo = Demo(tmp_path / "out")
    for num_bytes in (1000, 4000):
        process = demo.start_run()
        demo.wait_for_answers(process, num_bytes)
        process.kill()
        process.communicate(timeout=30)
        tally.injected("SIGKILL")
    _check(demo, wanted, tally)


def test_the_decode_processes_are_killed(
    tmp_path: Path, wanted: list[dict[str, Any]], tally: Tally
) -> None:
    """The feeder replaces its processes; the run does not even stop."""
    demo = Demo(tmp_path / "out")
    process = demo.start_run("--set", "engine.workers=2")
    parent = psutil.Process(process.pid)
    killed = 0
    while process.poll() is None and killed < 6:
        with contextlib.suppress(psutil.NoSuchProcess):  # what ends by itself
            for child in parent.children():
                if child.status() != psutil.STATUS_ZOMBIE and demo._journaled() > 500:
                    child.kill()
                    killed += 1
                    time.sleep(0.3)
        time.sleep(0.02)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert killed
    tally.injected("feeder death", killed)
    _check(demo, wanted, tally)
