"""A folder of pictures is a table of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import images
from pipeline.errors import EngineError, UserError
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, opened


def _fill(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(8, 8, seed=seed))
    return folder


def test_one_row_a_picture_sorted_by_folder_and_name(tmp_path: Path) -> None:
    _fill(
        tmp_path, "b.JPG", "a.png", "deep/c.webp", "notes.txt", ".x.jpg", "_t/y.jpg", "deep/d.heic"
    )
    source = opened(tmp_path, source="folder")
    assert [(f.path, f.num_rows) for f in source.files()] == [
        (str(tmp_path), 2),
        (str(tmp_path / "deep"), 2),
    ]
    rows = all_rows(source)
    assert [r.columns["file_name"] for r in rows] == ["a.png", "b.JPG", "c.webp", "d.heic"]
    assert rows[1].row_id == f"{tmp_path.name}:1"
    assert rows[2].columns["folder"] == str(tmp_path / "deep")
    settings = source.settings.model_copy(update={"base_path": "/elsewhere"})
    assert images.load(rows[0].images[0], settings) == jpeg(8, 8, seed=1)
    assert source.schema().names == ["file_name", "path", "folder"]


def test_globs_single_files_and_ids(tmp_path: Path) -> None:
    _fill(tmp_path, "a1.jpg", "a2.jpg", "b1.jpg", "deep/a3.jpg")
    rows = all_rows(opened(tmp_path / "a*.jpg", ["file_name"], source="folder", id="file_name"))
    assert [r.row_id for r in rows] == ["a1.jpg", "a2.jpg"]
    assert rows[0].columns == {"file_name": "a1.jpg"}
    rows = all_rows(opened(tmp_path / "b1.jpg", source="folder"))
    assert [r.columns["file_name"] for r in rows] == ["b1.jpg"]
    rows = all_rows(opened(tmp_path / "**/a*.jpg", source="folder"))
    assert len(rows) == 3


def test_ranges_and_growth(tmp_path: Path) -> None:
    _fill(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    source = opened(tmp_path, source="folder")
    (before,) = source.files()
    rows = list(source.read(str(tmp_path), 1, 3))
    assert [(r.index, r.columns["file_name"]) for r in rows] == [(0, "b.jpg"), (1, "c.jpg")]
    _fill(tmp_path, "d.jpg")
    assert source.files()[0].fingerprint != before.fingerprint
    with pytest.raises(EngineError, match="fewer pictures"):
        list(source.read(str(tmp_path), 0, 5))


def test_wrong_columns_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        opened(tmp_path, source="folder").files()
    _fill(tmp_path, "a.jpg")
    with pytest.raises(UserError, match="did you mean 'file_name'"):
        opened(tmp_path, ["filename"], source="folder").files()


def test_an_fsspec_folder() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/photos/a.jpg", jpeg(8, 8))
    try:
        source = opened("memory://photos", source="folder")
        (row,) = all_rows(source)
        assert images.load(row.images[0], source.settings) == jpeg(8, 8)
    finally:
        memory.rm("/photos", recursive=True)
