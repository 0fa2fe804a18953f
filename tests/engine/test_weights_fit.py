"""A model that cannot fit is refused before a weight is read, in one sentence with advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import fit
from pipeline.engine.fit import check_weights_fit
from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import ModelSizes
from pipeline.models.registry import family_for
from pipeline.settings import LabelSettings, ModelSettings
from scripts.bench import published
from tests.helpers.label_run import start_run

SIZES = ModelSizes(decoder_params=70 * 10**9, embedding_params=2 * 10**9, vision_params=10**9)
GPU = torch.device("cuda", 0)


def settings(quantization: str = "none", **engine: Any) -> LabelSettings:
    return LabelSettings(
        model={"id": "big/model", "quantization": quantization},
        input={"path": "x"},
        engine=engine,
    )


def check(
    monkeypatch: pytest.MonkeyPatch, total: float, asked: LabelSettings, used: float = 0.0
) -> None:
    """Weights of 146 GB, 76 in float8, on a card of `total` GB."""
    free = (int((total - used) * 1e9), int(total * 1e9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free)
    check_weights_fit(SIZES, asked, GPU, torch.bfloat16)


def test_what_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, 180, settings())
    check(monkeypatch, 90, settings("fp8"))
    check_weights_fit(ModelSizes(), settings(memory_limit_gb=0.1), GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("total", "asked", "message"),
    [
        (141, settings(), r"need 146\.0 GB and cuda:0 has 141\.0 GB, of which .* 125\.8;.*"
                          r"`model.quantization: fp8` needs 76\.0 GB: write that, or take a large"),
        (80, settings(), r"`model.quantization: fp8` needs 76\.0 GB: take a larger GPU$"),
        (80, settings("fp8"), r"need 76\.0 GB.* 70\.9; take a larger GPU or a smaller model$"),
        (180, settings(memory_limit_gb=100), r"cuda:0 has 100\.0 GB.* 88\.9; .* write that"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, total: float, asked: LabelSettings, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(monkeypatch, total, asked)


def test_what_others_hold_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"180\.0 GB, of which the model may take 110\.9"):
        check(monkeypatch, 180, settings(), used=50)


def test_a_cpu_refuses_by_its_whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.os, "sysconf", lambda name: 1 << 20 if "PHYS" in name else 4096)
    cpu = torch.device("cpu")
    check_weights_fit(ModelSizes(decoder_params=10**9), settings(), cpu, torch.float32)
    with pytest.raises(UserError, match=r"292\.0 GB and cpu has 4\.3 GB; .* large enough$"):
        check_weights_fit(SIZES, settings(), cpu, torch.float32)


def test_a_run_refuses_before_it_looks_for_weights(tmp_path: Path) -> None:
    """The folder has no weight file at all, so whoever looked for one would say that."""
    folder = tmp_path / "model"
    published.write_small_files("llava-next-72b", folder)
    ended = start_run(folder, tmp_path, [(64, 48)])
    assert ended.returncode == 2, ended.stderr
    assert re.search(r"the weights need 29\d\.\d GB and cpu has .* GB; .*fp8", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert "no *.safetensors" not in ended.stderr


@pytest.mark.parametrize(("name", "plain", "float8"), [
    ("llava-next-72b", 145.3, 75.2), ("llama-3.2-90b-vision", 177.2, 90.9),
    ("pixtral-large", 248.3, 126.6),
])  # fmt: skip
def test_the_large_models_need(name: str, plain: float, float8: float, tmp_path: Path) -> None:
    published.write_small_files(name, tmp_path)
    chosen = ModelSettings(id=str(tmp_path))
    sizes = family_for(Checkpoint.open(chosen), chosen).sizes
    assert sizes.num_bytes(2, False) / 1e9 == pytest.approx(plain, rel=0.005)
    assert sizes.num_bytes(2, True) / 1e9 == pytest.approx(float8, rel=0.01)
