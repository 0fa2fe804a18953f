"""Model folders that are wrong or mean harm: one sentence, and nothing outside is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.settings import ModelSettings
from tests.helpers.checkpoints import write_qwen2_5_vl
from tests.helpers.llava_checkpoint import write_twin as write_llava
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.parity import open_found
from tests.helpers.pixtral_checkpoint import write_twin as write_pixtral


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_qwen2_5_vl(tmp_path / "model")


@pytest.mark.parametrize("value", ["big", None, 0, [64], {}], ids=str)
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vision_config"])
def test_values_of_the_wrong_kind_are_one_sentence(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        if key in part:
            part[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    settings = ModelSettings(id=str(folder))
    try:
        family_for(Checkpoint(str(folder), folder), settings)
    except UserError as error:
        assert "\n" not in str(error)
        assert "qwen-vl" in str(error) or "config.json" in str(error)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_files_beside_it(folder: Path, file: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="is no file beside it"):
        Checkpoint(str(folder), folder).weight_files()


HOSTILE: tuple[tuple[str, str, Any], ...] = (
    ("pixtral", "architectures", 1.5),
    ("pixtral", "text_config.rope_scaling", "yarn"),
    ("pixtral", "text_config.intermediate_size", 1.5),
    ("pixtral", "vision_config.num_attention_heads", 3),
    ("pixtral", "image_token_index", 10**6),
    ("llava", "text_config.rope_theta", [2]),
    ("llava", "projector_hidden_act", {}),
    ("llava", "vision_config.num_attention_heads", 5),
    ("llava", "vision_config.image_size", [24, 24]),
    ("llava", "image_token_index", -1),
    ("mllama", "text_config.num_hidden_layers", "5"),
    ("mllama", "vision_config.attention_heads", 3),
    ("mllama", "image_token_index", 10**6),
)


@pytest.mark.parametrize(("kind", "key", "value"), HOSTILE, ids=str)
def test_a_model_that_cannot_be_built_is_one_sentence(
    tmp_path: Path, kind: str, key: str, value: Any
) -> None:
    write: Any = {"pixtral": write_pixtral, "llava": write_llava, "mllama": write_mllama}[kind]
    write(tmp_path, *(["1.6"] if kind == "llava" else []))
    config = json.loads((tmp_path / "config.json").read_text())
    *parts, last = key.split(".")
    part = config
    for name in parts:
        part = part[name]
    part[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        open_found(tmp_path)
    assert "\n" not in str(caught.value)
