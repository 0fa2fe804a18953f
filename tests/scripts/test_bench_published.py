"""The benchmark of a published config without a weight file, on a CPU with a tiny config."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "scripts/bench.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert ended.value.code == 0, ended.value


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_a_published_size_runs_without_files(
    small: Path, quantization: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--model-folder", str(small), "--quantization", quantization, "--no-record"]
    wanted = ["--rows", "8", "--work", "caption:1", "--set", "engine.device=cpu"]
    run(monkeypatch, "--published", "small", *options, *wanted)
    row: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["model"], row["quantization"]) == ("random small", quantization)
    assert row["failed"] == 0
    assert row["output_tokens"] == 8 * 128
    assert not list(small.glob("*.safetensors"))


def test_what_another_process_reads_needs_files(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="writes no weights"):
        run(monkeypatch, "--published", "small", "--ready")


def test_a_model_that_answers_nothing_ends_at_once(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules of `prefix` are longer than the small context."""
    options = ["--model-folder", str(small), "--no-record", "--set", "engine.device=cpu"]
    with pytest.raises(AssertionError, match=r"Every answer of the warm-up failed: .*context"):
        run(monkeypatch, "--published", "small", *options, "--rows", "8", "--work", "prefix:1")
