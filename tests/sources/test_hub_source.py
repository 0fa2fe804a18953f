"""Datasets of the hub and of local folders, streamed and loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.rows import ImageRef, Row
from pipeline.sources import Source
from tests.helpers.hub_standin import serve_hub
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, numbered, opened, write_lines, write_tar

READ = """
import json, sys
from pipeline.settings import InputSettings
from pipeline.sources import open_source
for line in sys.argv[1:]:
    source = open_source(InputSettings(source="hf", **json.loads(line)), ["text"])
    files = source.files()
    rows = [r for f in files for r in source.read(f.path, 1, f.num_rows)]
    found = {"files": [[f.path, f.num_rows, f.fingerprint] for f in files]}
    found["rows"] = [[r.row_id, r.columns["text"], len(r.images[0].data)] for r in rows]
    print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _check(source: Source, kind: str, count: int) -> list[Row]:
    files = source.files()
    assert type(source._reader).__name__ == kind  # type: ignore[attr-defined]
    assert sum(f.num_rows for f in files) == count
    rows = all_rows(source)
    assert [r.columns["text"] for r in rows] == [f"text {n}" for n in range(count)]
    assert source.schema().names == ["text"]
    part = list(source.read(files[0].path, 2, 4))
    assert [(r.index, r.columns["text"]) for r in part] == [(0, "text 2"), (1, "text 3")]
    assert [f.fingerprint for f in source.files()] == [f.fingerprint for f in files]
    return rows


@pytest.mark.parametrize(("streaming", "kind"), [(True, "ParquetSource"), (False, "_Loaded")])
def test_a_local_folder_of_parquet(tmp_path: Path, streaming: bool, kind: str) -> None:
    numbered(tmp_path / "in" / "x.parquet", 9)
    source = opened(tmp_path / "in", ["text"], source="hf", streaming=streaming)
    rows = _check(source, kind, 9)
    assert rows[3].images == (ImageRef(data=jpeg(8, 8, seed=3)),)


@pytest.mark.parametrize(("streaming", "kind"), [(True, "_Streamed"), (False, "_Loaded")])
def test_a_local_folder_of_json(tmp_path: Path, streaming: bool, kind: str) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "x.jsonl", [{"text": f"text {n}"} for n in range(6)])
    source = opened(tmp_path / "in", ["text"], source="hf", streaming=streaming, image=None)
    rows = _check(source, kind, 6)
    assert rows[0].row_id.endswith(":0")


def test_a_dataset_saved_to_disk_with_pictures(tmp_path: Path) -> None:
    import datasets

    cells = [{"bytes": jpeg(8, 8, seed=n), "path": None} for n in range(5)]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    columns = {"text": [f"text {n}" for n in range(5)], "image": cells}
    saved = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    rows = _check(opened(tmp_path / "saved", ["text"], source="hf"), "_Loaded", 5)
    assert rows[1].images == (ImageRef(data=jpeg(8, 8, seed=1)),)
    with pytest.raises(UserError, match="it has train"):
        opened(tmp_path / "saved", source="hf", split="test").files()


def test_a_local_folder_of_tars(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = []
    for n in range(4):
        members += [(f"{n}.jpg", jpeg(8, 8, seed=n)), (f"{n}.json", b'{"text": "text %d"}' % n)]
    write_tar(tmp_path / "in" / "x.tar", members)
    _check(opened(tmp_path / "in", ["text"], source="hf"), "WebDatasetSource", 4)


def test_wrong_names(tmp_path: Path) -> None:
    numbered(tmp_path / "in" / "x.parquet", 2)
    with pytest.raises(UserError, match="it has train"):
        opened(tmp_path / "in", source="hf", split="test").files()
    with pytest.raises(UserError, match="did you mean 'image'"):
        opened(tmp_path / "in", source="hf", image="imag").files()
    with pytest.raises(UserError, match="cannot be opened"):
        opened(tmp_path / "nowhere", source="hf").files()
    with pytest.raises(UserError, match="one dataset"):
        opened([tmp_path / "a", tmp_path / "b"], source="hf").files()


def _read_from_hub(endpoint: str, home: Path, *settings: dict[str, object]) -> list[dict]:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", READ, *map(json.dumps, settings)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    for number in range(2):
        numbered(tmp_path / f"hub/datasets/o/pets/data/train-{number}.parquet", 5)
    streamed, loaded = {"path": "o/pets"}, {"path": "o/pets", "streaming": False}
    with serve_hub(tmp_path / "hub") as endpoint:
        found = _read_from_hub(endpoint, tmp_path / "home1", streamed, loaded)
    with serve_hub(tmp_path / "hub", commit="b" * 40) as endpoint:
        (later,) = _read_from_hub(endpoint, tmp_path / "home2", streamed)
    paths = [f"hf://datasets/o/pets/data/train-{n}.parquet" for n in range(2)]
    assert [f[:2] for f in found[0]["files"]] == [[p, 5] for p in paths]
    assert found[0]["rows"][0] == ["train-0.parquet:1", "text 1", len(jpeg(8, 8, seed=1))]
    assert len(found[0]["rows"]) == 8
    assert [f[:2] for f in found[1]["files"]] == [["o/pets/default/train", 10]]
    assert len(found[1]["rows"]) == 9
    assert later == found[0]  # another commit with the same files gives the same plan
