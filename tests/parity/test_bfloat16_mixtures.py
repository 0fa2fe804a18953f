"""In bfloat16 latent attention and experts are as near to float32 as transformers is, and run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.models.families.kimi_vl import spec
from tests.engine.engine_bench import Bench, questions
from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
from tests.helpers.janus_checkpoint import write_janus
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.parity import make_prompt, open_ours, our_logits, random_text
from tests.parity.test_parity_kimi_vl import their_decoder

WRITERS: dict[str, Callable[[Path], Path]] = {
    "janus": write_janus,
    "deepseek-tiny": partial(write_deepseek_vl2, kind="tiny"),
    "deepseek-base": partial(write_deepseek_vl2, kind="base"),
    "kimi": write_kimi_vl,
}


@torch.inference_mode()
def test_errors_are_as_small(tmp_path: Path) -> None:
    """In the mean over many tokens: where scores lie close, either may choose another expert."""
    ours = open_ours(write_kimi_vl(tmp_path), spec.build, torch.bfloat16)
    exact_decoder = their_decoder()
    their_half = copy.deepcopy(exact_decoder).bfloat16()
    found = expected = 0.0
    for seed in range(6):
        prompt = make_prompt(ours.family, [random_text(150, seed)])
        ids = torch.from_numpy(prompt.tokens).long()[None]
        exact = exact_decoder(ids).logits[0]
        expected += (their_half(ids).logits[0].float() - exact).abs().mean().item()
        found += (our_logits(ours, prompt) - exact).abs().mean().item()
    assert found < 1.3 * expected


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_engine_runs(kind: str, quantization: str, tmp_path: Path) -> None:
    bench = Bench.open(WRITERS[kind](tmp_path))
    bench = bench.with_model(dtype="bfloat16", quantization=quantization)
    assert all(c.error is None for c in bench.run(questions(bench)).values())
