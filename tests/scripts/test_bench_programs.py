"""The benchmark's smaller programs run on a CPU with the model that ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import processes

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, *arguments, "--no-record"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_stages_of_a_workload() -> None:
    lanes = ("--set", "engine.decode_slots=4")
    row = _run("scripts/bench.py", "--work", "vqa:1", "--rows", "16", "--roofline", *lanes)
    assert row["failed"] == 0
    assert 0.9 < row["slot_occupancy_while_work_waits"] <= 1
    assert set(row["roofline"]["stages"]) >= {"vision", "prefill", "decode", "feed_wait"}


def test_the_texts_are_transformers() -> None:
    row = _run("scripts/bench.py", "--check", "--rows", "2", "--reps", "1")
    assert row["equal"] == row["answers"] == 6
    assert row["ratio"] > 0


def test_the_feeder_alone() -> None:
    row = _run("scripts/bench/feeder.py", "--workers", "1", "--images", "40")
    assert row["images_per_s"] > 0
    assert len(row["resident_mb"]) == 20


@pytest.mark.parametrize(
    ("options", "name"),
    [((), "fp8"), (("--kv-cache", "fp8"), "fp8_cache")],
    ids=["weights", "cache"],
)
def test_fp8_changes_little(options: tuple[str, ...], name: str) -> None:
    row = _run("scripts/bench/fp8.py", "--rows", "2", *options)
    assert row["name"] == name
    assert 0 < row["logit_error"] < 0.1
    assert row["top1_agreement"] > 0.9


def test_processes_below_this_one_are_counted() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert {os.getpid(), child.pid} <= set(processes.family())
        assert processes.family_resident_bytes() > 10e6
    assert processes.family_cpu_seconds() > 0


@pytest.mark.parametrize(
    "step", ["bf16", "fp8", "fp8_error", "vllm", "feeder", "ready", "job", "card24", "small"]
)
def test_every_step_is_defined(step: str) -> None:
    script = (ROOT / "scripts" / "gpu" / "step.sh").read_text()
    assert f"\n{step}() {{" in script
