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
