"""On a GPU Janus-Pro, DeepSeek-VL2 and Kimi-VL compute what they compute on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.models.base import DenseAttend, Model
from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
from tests.helpers.janus_checkpoint import write_janus
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.parity import (
    check_encodes_without_waiting,
    difference,
    mixed_prompt,
    open_found,
    our_logits,
    waiting_is_an_error,
)

pytestmark = pytest.mark.gpu
WRITERS: dict[str, Callable[[Path], Path]] = {
    "janus": write_janus,
    "deepseek-tiny": partial(write_deepseek_vl2, kind="tiny"),
    "deepseek-small": partial(write_deepseek_vl2, kind="small"),
    "deepseek-base": partial(write_deepseek_vl2, kind="base"),
    "kimi": write_kimi_vl,
}
SIZES = [(61, 45), (140, 56), (61, 45)]


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_logits_equal_the_cpus(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / kind)
    cpu = open_found(folder)
    prompt = mixed_prompt(cpu.family, SIZES)
    expected = our_logits(cpu, prompt)
    assert difference(our_logits(open_found(folder, "cuda"), prompt), expected) < 1e-3
    rounded = our_logits(open_found(folder, "cuda", torch.bfloat16), prompt)
    # NOTE: in bfloat16 a token whose scores lie close may go to another expert.
    alike = torch.nn.functional.cosine_similarity(rounded, expected)
    assert alike.median() > 0.995


@pytest.mark.parametrize("kind", WRITERS)
def test_engine_gives_the_cpus_tokens(kind: str, tmp_path: Path) -> None:
    """In float32: recorded steps, latent cache, shared segments."""
    folder = WRITERS[kind](tmp_path / kind)
    found = []
    for device in ("cpu", "cuda"):
        bench = Bench.open(folder, device=device).with_model(dtype="float32")
        found.append(outputs(bench.run(questions(bench))))
    same = sum(found[0][key] == found[1][key] for key in found[0])
    assert same >= len(found[0]) - 1


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_nothing_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    model = open_found(WRITERS[kind](tmp_path / kind), "cuda", torch.bfloat16)
    check_encodes_without_waiting(model, mixed_prompt(model.family, SIZES))
    x = model.embed(torch.arange(9, device="cuda"))
    at = torch.arange(9, device="cuda")[None]
    model.decoder(x, at, DenseAttend(model.decoder.config))
    with waiting_is_an_error():
        for layer in model.decoder.layers:
            layer.out(layer.qkv(x)[:, : _out_width(model)])
            layer.mlp(x)


def _out_width(model: Model) -> int:
    c = model.decoder.config
    return c.num_heads * (c.head_dim if c.mla is None else c.mla.rank)
