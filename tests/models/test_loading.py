"""Weights: names, shapes, merged matrices, file formats, and complaints that name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.models.families.qwen_vl import model as qwen_model
from pipeline.models.families.qwen_vl import spec
from pipeline.models.loading import Weights
from tests.helpers.checkpoint_copies import set_tensor
from tests.helpers.checkpoints import write_qwen2_5_vl, write_qwen2_vl
from tests.helpers.parity import (
    make_prompt,
    open_ours,
    our_logits,
    random_image,
    random_text,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"a.weight": torch.ones(2, 3), "b.weight": torch.full((1, 3), 2.0)}
    save_file(tensors | {"rotary_emb.inv_freq": torch.ones(4)}, path)
    return path


def test_take_converts_and_finish_is_content(file: Path) -> None:
    weights = Weights([file], "cpu", torch.bfloat16)
    assert weights.take("a.weight", (2, 3)).dtype == torch.bfloat16
    assert weights.take("b.weight", (1, 3), torch.float32).dtype == torch.float32
    weights.finish()


def test_rows_are_merged_and_padded(file: Path) -> None:
    weights = Weights([file], "cpu", torch.float32)
    merged = weights.take_rows(["a.weight", "b.weight"], [2, 1], 3, pad=3)
    assert merged[:, 0].tolist() == [1, 1, 0, 2, 0, 0]


def test_renaming_takes_the_first_rule_that_matches(file: Path) -> None:
    weights = Weights([file], "cpu", torch.float32, [(r"^a\.", "x.a."), (r"^", "y.")])
    assert weights.has("x.a.weight")
    assert weights.has("y.b.weight")


def test_missing_misshapen_and_left_over_tensors_are_named(file: Path) -> None:
    weights = Weights([file], "cpu", torch.float32)
    with pytest.raises(UserError, match=r"lacks the tensor 'c'"):
        weights.take("c", (1,))
    with pytest.raises(UserError, match=r"'a.weight' has shape \(2, 3\).*\(3, 2\)"):
        weights.take("a.weight", (3, 2))
    with pytest.raises(UserError, match=r"no place for: 'a.weight', 'b.weight'"):
        weights.finish()


def test_the_same_tensor_in_two_files(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    again.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="twice"):
        Weights([file, again], "cpu", torch.float32)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.bin", "gone.safetensors"])
def test_unreadable_files_are_named(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0 no weights here")
    with pytest.raises(UserError, match=name):
        Weights([tmp_path / name], "cpu", torch.float32)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": np.dtype("float32").newbyteorder}, path)
    with pytest.raises(UserError, match=r"pytorch_model.bin.*plain tensors"):
        Weights([path], "cpu", torch.float32)


def test_bin_and_sharded_files_load_alike(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = write_qwen2_vl(tmp_path / "whole")
    parts = write_qwen2_vl(tmp_path / "parts", files=3)
    pickled = write_qwen2_vl(tmp_path / "pickled")
    file = pickled / "model.safetensors"
    torch.save(load_file(file), pickled / "pytorch_model.bin")
    file.unlink()
    logits = []
    for folder in (whole, parts, pickled):
        model = open_ours(folder, spec.build)
        prompt = make_prompt(model.family, [random_text(3), random_image(60, 90)])
        logits.append(our_logits(model, prompt))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.self_attn.k_proj.bias", None, r"lacks .*layers\.1\.self_attn\.k_proj"),
        ("visual.merger.mlp.2.weight", (3, 3), r"merger\.mlp\.2\.weight.*\(3, 3\)"),
        ("model.layers.7.mlp.up_proj.weight", (2,), r"layers\.7\.mlp\.up_proj"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, name: str, shape: Any, message: str
) -> None:
    folder = set_tensor(write_qwen2_5_vl(tmp_path), name, shape)
    with pytest.raises(UserError, match=message):
        open_ours(folder, spec.build)


def test_a_config_that_lacks_a_key_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_qwen2_5_vl(tmp_path)
    monkeypatch.setattr(qwen_model, "build", lambda checkpoint, *_: checkpoint.config["no_key"])
    with pytest.raises(UserError, match=r"config.json lacks the key 'no_key'"):
        open_ours(folder, spec.build)


def test_a_tied_checkpoint_may_store_its_head_as_well(tmp_path: Path) -> None:
    folder = write_qwen2_vl(tmp_path, tied=True)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    same = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": same}, file, {"format": "pt"})
    model = open_ours(folder, spec.build)
    assert model.decoder.head.weight is model.embedding
