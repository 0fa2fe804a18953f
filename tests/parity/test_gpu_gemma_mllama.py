"""On a GPU Gemma 3 and Llama 3.2 Vision answer as on a CPU, with graphs and without; float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.gemma_checkpoint import write_gemma3
from tests.helpers.mllama_checkpoint import write_mllama

pytestmark = pytest.mark.gpu
WRITERS = {"gemma3": write_gemma3, "mllama": write_mllama}


def open_wide(folder: Path, **engine: Any) -> Bench:
    """A bench that computes in float32 everywhere."""
    bench = Bench.open(folder, **engine)
    model = bench.settings.model.model_copy(update={"dtype": "float32"})
    bench.settings = bench.settings.model_copy(update={"model": model})
    return bench


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
