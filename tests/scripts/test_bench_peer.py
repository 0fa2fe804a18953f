"""A peer's program and ours make the same rows, and their repetitions are paired."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import peer, results, workloads

ROOT = Path(__file__).resolve().parents[2]
STANDIN = '''
"""Answers like vLLM's offline engine."""
__version__ = "0"

class SamplingParams:
    def __init__(self, max_tokens, ignore_eos, temperature):
        self.max_tokens = max_tokens

class _Out:
    def __init__(self, ids):
        self.token_ids = ids

class _Answer:
    def __init__(self, asked, limit):
        assert asked["multi_modal_data"]["image"].mode == "RGB"
        self.prompt_token_ids = asked["prompt"].split()
        self.outputs = [_Out([0] * limit.max_tokens)]

class LLM:
    def __init__(self, **options):
        assert options["load_format"] == "dummy"

    def generate(self, asked, limits, use_tqdm):
        return [_Answer(a, limit) for a, limit in zip(asked, limits, strict=True)]
'''


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    (tmp_path / "vllm" / "vllm").mkdir(parents=True)
    (tmp_path / "vllm" / "vllm" / "__init__.py").write_text(STANDIN)
    return tmp_path


def test_vllm_is_asked_our_rows(standin: Path) -> None:
    asked = ["--work", "mixed:2,vqa:1", "--rows", "8", "--no-warmup", "--seed", "3"]
    lines = peer.run("vllm", "folder", str(standin), asked)
    assert [(line["work"], line["rows"]) for line in lines] == [
        ("mixed", 8),
        ("mixed", 8),
        ("vqa", 8),
    ]
    for line in lines[:2]:
        load = workloads.make("mixed", 8, line["seed"])
        assert line["output_tokens"] == sum(load.output_tokens)
    assert [line["seed"] for line in lines[:2]] == [
        workloads.repetition_seed(3, number) for number in (0, 1)
    ]


def test_repetitions_of_one_seed_are_paired() -> None:
    ours = {
        "work": "caption", "rows": 8, "device": "card", "seeds": [1, 2, 3],
        "seconds": [2.0, 2.0, 4.0],
    }  # fmt: skip
    line = {"peer": "vllm", "work": "caption", "rows": 8, "device": "card", "rows_per_s": 2.0}
    lines = [line | {"seed": seed, "seconds": 4.0} for seed in (2, 3, 4)]
    lines += [line | {"seed": 1, "seconds": 400.0, "device": "another"}]
    lines += [line | {"seed": 1, "seconds": 6.0, "quantization": "fp8"}]
    found = peer.beside(ours, lines)
    assert found["vllm"]["repetitions_paired"] == 2
    assert found["vllm"]["ratio"] == 1.5
    assert found["vllm_fp8"]["ratio"] == 3.0


def test_rows_of_the_same_source_get_the_commit(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"commit": f"source-{results.source_hash()}"}, {"commit": "source-elsewhere0"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row["commit"] for row in results.measured_elsewhere(file)]
    assert found == [results.commit(), "source-elsewhere0"]


def test_commit_is_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BENCH_COMMIT", "abc")
    assert results.commit() == "abc"


def test_the_steps_for_a_gpu_machine_are_a_valid_script() -> None:
    script = ROOT / "scripts" / "gpu" / "step.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("bench.py", "bench/peer_vllm.py"):
        command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for option in ("--work", "--rows", "--seed", "--seconds"):
            assert option in done.stdout
