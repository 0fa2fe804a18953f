"""Llama 3.2 Vision's checkpoints: found out, refused where they do not fit, run by the command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.models.families.mllama import spec
from pipeline.models.family import Family
from tests.helpers.checkpoint_copies import copy_with_tensor
from tests.helpers.families import found_family
from tests.helpers.label_run import label_run, start_run
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.parity import difference, open_ours, random_image


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


def changed(folder: Path, new: Path, part: str, changes: dict[str, Any]) -> Path:
    """A copy whose config of `part`, or whose processor's file, has `changes`."""
    shutil.copytree(folder, new)
    path = new / ("preprocessor_config.json" if part == "processor" else "config.json")
    config = json.loads(path.read_text())
    config.get(part, config).update(changes)
    path.write_text(json.dumps(config))
    return new


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("processor", {"do_normalize": False}),
        ("processor", {"rescale_factor": 1.0}),
        ("processor", {"resample": 0}),
        ("processor", {"size": {"height": 28, "width": 28}}),
        ("processor", {"max_image_tiles": 2}),
        ("vision_config", {"intermediate_layers_indices": [0, 4]}),
        ("vision_config", {"supported_aspect_ratios": [[1, 1]]}),
        ("text_config", {"cross_attention_layers": [7]}),
        ("text_config", {"partial_rotary_factor": 0.5}),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        open_ours(changed(folder, tmp_path / "new", part, changes), spec.build)


@torch.inference_mode()
def test_states_in_the_order_of_the_config(folder: Path, tmp_path: Path) -> None:
    """Of blocks named in any order, from either end; a mean that the file leaves out is a half."""
    from transformers import MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    order = {"intermediate_layers_indices": [3, -3]}
    new = changed(folder, tmp_path / "new", "vision_config", order)
    path = new / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in ("size", "max_image_tiles")}))
    model: Any = open_ours(new, spec.build)
    theirs: Any = MllamaForConditionalGeneration.from_pretrained(new, dtype=torch.float32).model
    image = random_image(120, 50)
    inputs = MllamaImageProcessorPil.from_pretrained(new)(
        [[Image.fromarray(image)]], return_tensors="pt"
    )
    inputs.pop("num_tiles")
    states = theirs.multi_modal_projector(theirs.vision_model(**inputs).last_hidden_state)
    found = model.encode_images([torch.from_numpy(image)], [model.family.layout(120, 50)])
    assert difference(found, states.flatten(0, -2)) < 1e-4
