"""Llama 3.2 Vision's checkpoints: found out, refused where they do not fit, run by the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.models.families.mllama import spec
from pipeline.models.family import Family
from tests.helpers.checkpoint_copies import copy_with_tensor
from tests.helpers.families import found_family
from tests.helpers.label_run import label_run, start_run
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.parity import open_ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama") / "original")


family_of = partial(found_family, Family)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vision_model.gated_positional_embedding.gate", None),
        ("language_model.model.layers.1.cross_attn.q_norm.weight", (7,)),
        ("language_model.model.layers.1.self_attn.q_proj.weight", (2, 2)),
    ],
)
def test_a_wrong_tensor_is_named(
    folder: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None
) -> None:
    broken = copy_with_tensor(folder, tmp_path / "broken", name, shape)
    with pytest.raises(UserError, match=name.partition("layers.")[2] or "embedding.gate"):
        open_ours(broken, spec.build)


def test_detection(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert spec.matches(config)
    assert spec.matches({k: v for k, v in config.items() if k != "architectures"})
    assert not spec.matches(config | {"architectures": ["MllamaForCausalLM"]})
    assert family_of(folder, chat_template="llama_3_vision").name == "mllama"
    with pytest.raises(UserError, match="llama_3_vision"):
        family_of(folder, chat_template="qwen2-vl")


def test_run(folder: Path, tmp_path: Path) -> None:
    sizes = [(64, 48), (30, 90), (112, 112)]
    rows = label_run(folder, tmp_path, sizes, "llama_3_vision")
    assert all(row["status"] == "ok" for row in rows)
    refused = start_run(folder, tmp_path, [(64, 48)], "vicuna_v1.1")
    assert refused.returncode == 2
    assert "llama_3_vision" in refused.stderr
