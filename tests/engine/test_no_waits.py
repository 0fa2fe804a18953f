"""On a GPU the host asks for work ahead: no batch and no step makes it wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.parity import waiting_is_an_error

DRAWN = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_host_waits_for_nothing(
    folder: Path, sampling: dict[str, Any], quantization: str
) -> None:
    bench = Bench.open(folder, device="cuda").with_model(quantization=quantization)
    asked = questions(bench, **sampling)
    engine = bench.engine()
    for _ in range(2):  # kernels are compiled, graphs captured, tables made
        before = outputs(bench.run(asked, engine))
    with waiting_is_an_error():
        again = outputs(bench.run(asked, engine))
    assert again == before
