"""On a GPU Gemma 3 and Llama 3.2 Vision answer as on a CPU, with graphs and without; float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import cascade
from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.checkpoints import write_json
from tests.helpers.gemma_checkpoint import write_gemma3
from tests.helpers.mllama_checkpoint import write_mllama

pytestmark = pytest.mark.gpu
WRITERS = {"gemma3": write_gemma3, "mllama": write_mllama}


def open_wide(folder: Path, **engine: Any) -> Bench:
    """A bench that computes in float32 everywhere."""
    return Bench.open(folder, **engine).with_model(dtype="float32")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_tokens_equal_the_cpus(
    write: Callable[[Path], Path], graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    folder = write(tmp_path)
    cpu, gpu = open_wide(folder), open_wide(folder, device="cuda", cuda_graphs=graphs)
    expected = outputs(cpu.run(questions(cpu, stop_token_ids=(-1,))))
    assert outputs(gpu.run(questions(gpu, stop_token_ids=(-1,)))) == expected


@pytest.mark.parametrize("window", [12, 4096])
def test_shared_ranges_heed_windows(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes read a shared range together only where no window cuts it."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(cascade, "MIN_LENGTH", 16)
    made: list[Any] = []
    share = cascade.share
    monkeypatch.setattr(
        "pipeline.engine.decode.share", lambda *given: made.append(share(*given)) or made[-1]
    )
    config = json.loads((write_gemma3(tmp_path) / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    write_json(tmp_path / "config.json", config)
    found = []
    for sharing in (True, False):
        bench = open_wide(tmp_path, device="cuda", share_images=sharing, share_prefix=sharing)
        found.append(outputs(bench.run(questions(bench, stop_token_ids=(-1,)))))
    assert found[0] == found[1]
    assert any(table is not None for table in made) == (window > 100)
