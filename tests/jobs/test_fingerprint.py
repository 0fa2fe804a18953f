"""The fingerprint and the manifest: what changes an answer is refused by name, the rest is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.fingerprint import checkpoint_identity, difference, fingerprint
from jobs.manifest import open_manifest, package_versions, read_manifest, require_manifest
from jobs.paths import RunPaths
from pipeline.errors import UserError
from tests.helpers.run_folder import make_config

IDENTITY = {"weights": "w0", "files": "f0"}


def changed(**over: Any) -> list[str]:
    old = fingerprint(make_config(), IDENTITY)
    new = fingerprint(make_config(**over), IDENTITY)
    assert (old.digest == new.digest) == (old.fields == new.fields)
    return difference(old.fields, new.fields)


@pytest.mark.parametrize(
    ("over", "fields"),
    [
        ({"prompts": {"caption": "Other."}}, ["prompts.caption.text"]),
        (
            {"prompts": {"caption": {"text": "Describe.", "schema": {"type": "object"}}}},
            ["prompts.caption.schema"],
        ),
        ({"system": "Be brief."}, ["system"]),
        ({"generation": {"temperature": 0.5}}, ["generation.temperature"]),
        ({"generation": {"seed": 1}}, ["generation.seed"]),
        ({"generation": {"stop": ["x"]}}, ["generation.stop"]),
        ({"model": {"dtype": "float32"}}, ["model.dtype"]),
        ({"model": {"quantization": "fp8"}}, ["model.quantization"]),
        ({"model": {"chat_template": "qwen2-vl"}}, ["model.chat_template"]),
        ({"input": {"image": "picture"}}, ["input.image"]),
        ({"input": {"keep": ["url"]}}, ["input.keep"]),
        ({"engine": {"deterministic": True}}, ["engine.deterministic"]),
        ({"engine": {"kv_cache": "fp8"}}, ["engine.kv_cache"]),
    ],
)
def test_what_changes_an_answer_counts(over: dict[str, Any], fields: list[str]) -> None:
    assert changed(**over) == fields


def test_a_setting_that_older_run_folders_lack_counts_when_it_is_used() -> None:
    assert "engine.kv_cache" not in fingerprint(make_config(), IDENTITY).fields


@pytest.mark.parametrize(
    "over",
    [
        {"output": {"path": "elsewhere", "rows_per_shard": 7, "compression": "none"}},
        {"checkpoint": {"interval_sec": 1}},
        {"retry": {"attempts": 9}},
        {"engine": {"memory_fraction": 0.5, "decode_slots": 3, "cuda_graphs": False}},
        {"input": {"path": "moved/*.parquet", "limit": 4, "remote": True}},
        {"model": {"id": "/another/place"}},
    ],
)
def test_where_and_how_fast_does_not(over: dict[str, Any]) -> None:
    assert changed(**over) == []


def test_prompts_count_by_name_and_order() -> None:
    one = make_config(prompts={"a": "1", "b": "2"})
    two = make_config(prompts={"b": "2", "a": "1"})
    fields = [fingerprint(config, IDENTITY).fields for config in (one, two)]
    assert difference(*fields) == ["prompts"]


def test_new_settings_with_defaults_are_seen() -> None:
    old = fingerprint(make_config(), IDENTITY).fields
    assert difference(old, {**old, "generation.new": "x"}) == ["generation.new"]


def checkpoint(folder: Path, weights: bytes = bytes(5_000_000)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("read me")
    return folder


def test_a_checkpoint_counts_by_content_not_place(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    identity = checkpoint_identity(folder)
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("changed")
    (tmp_path / "b" / "trainer_state.json").write_text("{}")
    assert checkpoint_identity(tmp_path / "b") == identity
    (tmp_path / "b" / "config.json").write_text('{"a": 2}')
    assert difference(identity, checkpoint_identity(tmp_path / "b")) == ["files"]


@pytest.mark.parametrize("at", [0, 70_000, 2_500_000, -1])
def test_other_weights_are_another_checkpoint(tmp_path: Path, at: int) -> None:
    """A training step changes weights everywhere; here whole blocks change, at several places."""
    identity = checkpoint_identity(checkpoint(tmp_path / "a"))
    weights = bytearray(5_000_000)
    at %= len(weights)
    weights[max(at - 300_000, 0) : at + 300_000] = b"\1" * (at + 300_000 - max(at - 300_000, 0))
    other = checkpoint_identity(checkpoint(tmp_path / "b", bytes(weights[:5_000_000])))
    assert difference(identity, other) == ["weights"]
    longer = checkpoint_identity(checkpoint(tmp_path / "c", bytes(5_000_001)))
    assert difference(identity, longer) == ["weights"]


def test_the_manifest_is_written_once_and_kept(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path))
    config = make_config()
    first = open_manifest(paths, config, fingerprint(config, IDENTITY), model={"id": "demo"})
    again = open_manifest(paths, config, fingerprint(config, IDENTITY))
    assert first == again == require_manifest(paths)
    assert first.job_config() == config
    assert first.model == {"id": "demo"}
    assert "python" in first.packages


def test_another_job_is_refused_by_name(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path))
    config = make_config()
    open_manifest(paths, config, fingerprint(config, IDENTITY))
    other = make_config(generation={"temperature": 0.7}, prompts={"caption": "x" * 99})
    with pytest.raises(UserError) as raised:
        open_manifest(paths, other, fingerprint(other, IDENTITY))
    text = str(raised.value)
    assert "generation.temperature was null and is 0.7" in text
    assert 'prompts.caption.text was "Describe." and is "xxx' in text
    assert "choose another output.path" in text
    with pytest.raises(UserError, match=r"settings: model\.weights\. Put"):
        open_manifest(paths, config, fingerprint(config, {**IDENTITY, "weights": "w1"}))


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path))
    assert read_manifest(paths) is None
    with pytest.raises(UserError, match="is no run folder"):
        require_manifest(paths)
    for text in ("", "{", "[]", "{}", '{"schema_version": 1}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_manifest(paths)
    config = make_config()
    (tmp_path / "manifest.json").unlink()
    open_manifest(paths, config, fingerprint(config, IDENTITY))
    whole = (tmp_path / "manifest.json").read_bytes()
    for at in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        (tmp_path / "manifest.json").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged|newer"):
            read_manifest(paths)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="newer vlm-batch"):
        read_manifest(paths)


def test_versions_load_nothing() -> None:
    assert "pyarrow" in package_versions()
