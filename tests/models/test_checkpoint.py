"""Opening checkpoints: folders, the shipped model, hub ids, and what is said when one is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models import checkpoint as module
from pipeline.models.checkpoint import Checkpoint
from pipeline.settings import ModelSettings
from tests.helpers.checkpoints import write_qwen2_vl


def open_folder(folder: Path) -> Checkpoint:
    return Checkpoint.open(ModelSettings(id=str(folder)))


def test_a_folder(tmp_path: Path) -> None:
    write_qwen2_vl(tmp_path)
    checkpoint = open_folder(tmp_path)
    assert checkpoint.config["model_type"] == "qwen2_vl"
    assert checkpoint.preprocessor_config["patch_size"] == 14
    assert checkpoint.revision is None
    assert checkpoint.json("no_such.json") is None
    assert json.loads(checkpoint.tokenizer_json)
    assert checkpoint.token_id("<|im_end|>") is not None
    assert checkpoint.token_id("<|none|>") is None
    assert [path.suffix for path in checkpoint.weight_files()] == [".safetensors"]
    assert checkpoint.num_weight_bytes == sum(p.stat().st_size for p in checkpoint.weight_files())


def test_nested_processor_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"patch_size": 16}}')
    assert open_folder(tmp_path).preprocessor_config == {"patch_size": 16}
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    assert open_folder(tmp_path).preprocessor_config == {"patch_size": 16}
    assert open_folder(tmp_path).generation_config == {}


def test_weights_named_by_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"metadata": {"total_size": 77}, "weight_map": {"a": "two.safetensors", "b": "one.st"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_folder(tmp_path)
    with pytest.raises(UserError, match=r"one\.st"):
        checkpoint.weight_files()
    for name in ("one.st", "two.safetensors", "stray.safetensors"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint.weight_files()] == ["one.st", "two.safetensors"]
    assert checkpoint.num_weight_bytes == 77


def test_pickled_weights_where_there_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        open_folder(tmp_path).weight_files()
    (tmp_path / "pytorch_model.bin").touch()
    assert [p.name for p in open_folder(tmp_path).weight_files()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_json_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        open_folder(tmp_path).config  # noqa: B018


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        open_folder(tmp_path).tokenizer_json  # noqa: B018
    for wrong in ("/no/such/folder", "Qwen2.5-VL", "a/b/c", "./here"):
        with pytest.raises(UserError, match="folder"):
            Checkpoint.open(ModelSettings(id=wrong))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100_000))
    first = open_folder(tmp_path).identity()
    assert first == open_folder(tmp_path).identity()
    weights.write_bytes(bytes(50_000) + b"x" + bytes(49_999))
    second = open_folder(tmp_path).identity()
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, open_folder(tmp_path).identity()}) == 3


class FakeHub:
    """Stands in for `_download`: one commit, and files that appear when asked for."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files, self.asked = folder, files, []

    def __call__(self, model_id: str, revision: str, patterns: Any) -> Path:
        self.asked.append((model_id, revision))
        for name, content in self.files.items():
            if any(Path(name).match(pattern) for pattern in patterns):
                (self.folder / name).write_text(content)
        return self.folder


def test_a_hub_id_fetches_weights_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("c" * 40)
    folder.mkdir()
    hub = FakeHub(folder, {"config.json": "{}", "model.safetensors": "x"})
    monkeypatch.setattr(module, "_download", hub)
    checkpoint = Checkpoint.open(ModelSettings(id="a/b", revision="v1"))
    assert checkpoint.revision == "c" * 40
    assert checkpoint.identity() == "a/b@" + "c" * 40
    assert not (folder / "model.safetensors").exists()
    assert [path.name for path in checkpoint.weight_files()] == ["model.safetensors"]
    assert hub.asked == [("a/b", "v1"), ("a/b", "c" * 40)]


def test_a_hub_id_without_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no-such-org/no-such-model") as caught:
        Checkpoint.open(ModelSettings(id="no-such-org/no-such-model"))
    assert "\n" not in str(caught.value)


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    write_qwen2_vl(tmp_path)
    code = (
        "import sys\n"
        "from pipeline import estimate, prepare, planner\n"
        "from pipeline.models.checkpoint import Checkpoint\n"
        "from pipeline.models.registry import family_for, list_families\n"
        "from pipeline.settings import ModelSettings\n"
        f"settings = ModelSettings(id={str(tmp_path)!r})\n"
        "family_for(Checkpoint.open(settings), settings)\n"
        "list_families()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
