"""Every shipped config is valid and runs as its first lines say, with the model that ships."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.config import load_config
from tests.helpers.job_folder import ROOT

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SCENES = ROOT / "pipeline/demo/data/scenes.parquet"
NUM_ROWS = 3


def _table(folder: Path) -> Path:
    path = folder / "scenes.parquet"
    pq.write_table(pq.read_table(SCENES).slice(0, NUM_ROWS), path)
    return path


def _pictures(folder: Path) -> Path:
    cells = pq.read_table(SCENES, columns=["image"]).slice(0, NUM_ROWS).column("image")
    pictures = folder / "photos"
    pictures.mkdir()
    for number, cell in enumerate(cells.to_pylist()):
        data = cell["bytes"] if isinstance(cell, dict) else cell
        (pictures / f"{number}.jpg").write_bytes(data)
    return pictures


def _dataset(folder: Path) -> Path:
    """A dataset as `datasets` finds one: the hub itself is tests/remote's."""
    (folder / "set/data").mkdir(parents=True)
    _table(folder).rename(folder / "set/data/test-00000.parquet")
    return folder / "set"


def _chats(folder: Path) -> Path:
    table = pq.read_table(SCENES).slice(0, NUM_ROWS)
    part = {"type": "image_url", "image_url": {"url": "image:0"}}
    ask = {"type": "text", "text": "Describe this image."}
    turns = [[{"role": "user", "content": [part, ask]}]] * NUM_ROWS
    path = folder / "chats.parquet"
    pq.write_table(pa.table({"messages": turns, "image": table.column("image")}), path)
    return path


INPUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {  # the variable that names the input
    "caption.yaml": ("IMAGES", _table),
    "vqa.yaml": ("IMAGES", _table),
    "ocr_json.yaml": ("IMAGES", _table),
    "folder.yaml": ("FOLDER", _pictures),
    "hub.yaml": ("DATASET", _dataset),
    "chat.yaml": ("ROWS", _chats),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_says_how_it_is_started(name: str) -> None:
    path = ROOT / "configs" / name
    config = load_config(path)
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"vlm-batch run configs/{name}" in line for line in comment)
    for variable in re.findall(r"\b([A-Z_]+)=", " ".join(comment)):
        assert f"${{{variable}" in path.read_text(), f"{variable} is documented and not read"
    assert config.prompt_names()


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variable, make = INPUTS[name]
    monkeypatch.setenv(variable, str(make(tmp_path)))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("MODEL", "demo")
    sets = ("--set", "generation.max_new_tokens=24", *extra(name))
    arguments = (str(ROOT / "configs" / name), *sets)
    for command in ("validate", "plan", "run"):
        assert main([command, *arguments]) == 0, capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out/data").to_pylist()
    assert len(rows) == NUM_ROWS
    assert_answered(name, rows)


def extra(name: str) -> tuple[str, ...]:
    return ("--set", "prompts.page.max_new_tokens=400") if name == "ocr_json.yaml" else ()


def assert_answered(name: str, rows: list[dict[str, Any]]) -> None:
    if name == "ocr_json.yaml":  # the demo model writes no page; what it writes is the schema's
        for row in rows:
            assert row["status"] == "ok" or row["error_code"] == "schema_invalid"
            assert row["status"] != "ok" or set(row["page"]) == {"title", "language", "lines"}
        return
    for row in rows:
        assert row["status"] == "ok", row["error"]
