"""In bfloat16 Gemma 3 and Llama 3.2 Vision are as near to float32 as transformers is, and run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.models.families.gemma3 import spec as gemma3_spec
from pipeline.models.families.mllama import spec as mllama_spec
from tests.engine.engine_bench import Bench
from tests.helpers.gemma_checkpoint import write_gemma3
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.parity import difference, make_prompt, open_ours, our_logits
from tests.parity import test_parity_gemma3 as gemma3
from tests.parity import test_parity_mllama as mllama

KINDS = {
    "gemma3": (write_gemma3, gemma3_spec, gemma3),
    "mllama": (write_mllama, mllama_spec, mllama),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bfloat16")
    return {kind: write(root / kind) for kind, (write, _, _) in KINDS.items()}


@cache
def theirs(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_errors_are_as_small(folders: dict[str, Path], kind: str) -> None:
    cases: ModuleType = KINDS[kind][2]
    folder, half = folders[kind], torch.bfloat16
    ours = open_ours(folder, KINDS[kind][1].build, half)
    found, expected = [], []
    for parts in cases.PROMPTS.values():
        prompt = make_prompt(ours.family, parts)
        inputs = cases.inputs_of(folder, prompt.tokens, prompt.images)
        exact = theirs(folder, torch.float32)(**inputs).logits[0]
        narrow = {k: v.to(half) if v.is_floating_point() else v for k, v in inputs.items()}
        expected.append(difference(theirs(folder, half)(**narrow).logits[0].float(), exact))
        if kind == "gemma3":
            logits = our_logits(ours, prompt)
        else:
            logits = ours.decoder.logits(cases.our_hidden(ours, prompt))
        found.append(difference(logits, exact))
    assert max(found) < 1.5 * max(expected)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs(folders: dict[str, Path], kind: str, quantization: str) -> None:
    bench = Bench.open(folders[kind]).with_model(dtype="bfloat16", quantization=quantization)
    questions = gemma3.gemma_questions if kind == "gemma3" else mllama.mllama_questions
    assert all(c.error is None for c in bench.run(questions(bench)).values())
