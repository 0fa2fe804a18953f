"""`engine.deterministic`: the same bits for a row in whatever batch, sharing and lanes it runs.

On a GPU in bfloat16 and float8; on a CPU, whose attention is the library's, the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.kernels.backend import invariant, set_invariant
from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.janus_checkpoint import write_janus
from tests.helpers.llava_checkpoint import write_original
from tests.helpers.pixtral_checkpoint import write_twin

ARRANGEMENTS: list[dict[str, Any]] = [
    {},
    {"decode_slots": 1, "overlap": False},
    {"decode_slots": 32, "prefill_tokens": 4096},
    {"share_images": False},
    {"share_images": False, "share_prefix": False, "prefill_tokens": 64},
]
OTHERS: dict[str, Callable[[Path], Path]] = {
    "llava-1.5": lambda folder: write_original(folder, "1.5"),
    "llava-1.6": lambda folder: write_original(folder, "1.6"),
    "onevision": lambda folder: write_original(folder, "onevision"),
    "pixtral": write_twin,
    "janus": write_janus,
}
DEVICES = [
    pytest.param(("cpu", "none", "auto"), id="cpu"),
    pytest.param(("cuda", "none", "auto"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", "fp8", "auto"), id="cuda-fp8", marks=pytest.mark.gpu),
    pytest.param(("cuda", "none", "fp8"), id="cuda-fp8-cache", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    set_invariant(False)


@pytest.mark.parametrize("kind", DEVICES)
def test_same_bits_in_every_arrangement(folder: Path, kind: tuple[str, str, str]) -> None:
    check_bits(folder, *kind)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("family", OTHERS)
def test_same_bits_in_other_families(
    family: str, kind: tuple[str, str, str], tmp_path: Path
) -> None:
    check_bits(OTHERS[family](tmp_path / "model"), *kind)


def check_bits(folder: Path, device: str, quantization: str, kv_cache: str) -> None:
    """The first tokens' logits have the same bits on a GPU, and all texts are the same."""
    texts, bits = [], []
    for arrangement in ARRANGEMENTS:
        bench = Bench.open(
            folder, device=device, deterministic=True, kv_cache=kv_cache, **arrangement
        )
        bench = bench.with_model(quantization=quantization)
        engine = bench.engine()
        assert invariant()
        first: dict[Any, torch.Tensor] = {}
        start = engine._start

        def keep(
            sequences: Any, logits: torch.Tensor, start: Any = start, kept: Any = first
        ) -> None:
            kept.update(
                (s.request.key, row.cpu()) for s, row in zip(sequences, logits, strict=True)
            )
            start(sequences, logits)

        engine._start = keep
        texts.append(outputs(bench.run(questions(bench), engine)))
        bits.append(first)
    assert all(found == texts[0] for found in texts)
    for found in bits:
        assert found.keys() == bits[0].keys()
        if device == "cuda":
            different = [k for k, row in found.items() if not torch.equal(row, bits[0][k])]
            assert not different, different


def test_other_families_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.errors import UserError
    from pipeline.models.families.qwen_vl.model import QwenVL

    monkeypatch.setattr(QwenVL, "invariant", False)
    with pytest.raises(UserError, match="deterministic"):
        Bench.open(folder, device="cpu", deterministic=True).engine()
