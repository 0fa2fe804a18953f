"""Videos from every source: cells of every kind, a chosen extension, files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, opened, write_lines, write_parquet, write_tar

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _videos(rows: list[Row]) -> list[tuple[ImageRef, ...] | str]:
    return [row.videos if row.error is None else row.error.code for row in rows]


def _ref(data: bytes | None = None, path: str | None = None) -> ImageRef:
    return ImageRef(data, path, "video")


def test_a_video_column_means_no_image_column() -> None:
    assert InputSettings(path="x", video="clip").image is None
    assert InputSettings(path="x", video="clip", image="image").image == "image"
    assert InputSettings(path="x").image == "image"


def test_parquet_cells(tmp_path: Path) -> None:
    cells = [
        {"bytes": b"one", "path": None},
        {"bytes": None, "path": "a/b.mp4"},
        {"bytes": b"two", "path": "name.mp4"},
        None,
    ]
    path = write_parquet(tmp_path / "a.parquet", {"clip": pa.array(cells, STRUCT)})
    rows = all_rows(opened(path, (), video="clip"))
    assert _videos(rows) == [(_ref(b"one"),), (_ref(path="a/b.mp4"),), (_ref(b"two"),), ()]
    assert all("clip" not in row.columns and not row.images for row in rows)


def test_lists_beside_images(tmp_path: Path) -> None:
    columns = {"clips": [["a.mp4", "https://x.org/b.mp4"], [], ["a"] * 9, ["a", None]],
               "image": [jpeg(8, 8)] * 4}  # fmt: skip
    path = write_parquet(tmp_path / "a.parquet", columns)
    rows = all_rows(opened(path, (), video="clips", image="image"))
    both = (_ref(path="a.mp4"), _ref(path="https://x.org/b.mp4"))
    assert _videos(rows) == [both, (), "too_many_videos", "missing_video"]
    assert [len(row.images) for row in rows] == [1, 1, 1, 1]


def test_cells_that_are_none(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"clip": [3, 4]})
    assert _videos(all_rows(opened(path, (), video="clip"))) == ["bad_row", "bad_row"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"videos": ["x"]})
    with pytest.raises(UserError, match=r"input\.video names the column 'video'.*'videos'"):
        opened(path, (), video="video").files()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_with_the_hubs_video_feature(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = {"clip": {"_type": "Video"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"clip": pa.array([{"bytes": b"v", "path": "v.mp4"}], STRUCT), "text": ["t"]})
    folder = tmp_path / "set"
    write_parquet(folder / "train.parquet", {})
    import pyarrow.parquet as pq

    pq.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet")
    source = opened(folder, ("text",), source="hf", video="clip", streaming=streaming)
    (row,) = all_rows(source)
    assert row.videos == (_ref(b"v"),)
    assert dict(row.columns) == {"text": "t"}


def test_requests_bring_videos(tmp_path: Path) -> None:
    line: dict[str, Any] = {"custom_id": "a", "body": {"messages": []}, "clip": "x.mp4"}
    path = write_lines(tmp_path / "a.jsonl", [line])
    (row,) = all_rows(opened(path, None, source="openai", video="clip"))
    assert row.videos == (_ref(path="x.mp4"),)


def test_samples_of_a_tar(tmp_path: Path) -> None:
    members = [
        ("a.mp4", b"first"), ("a.jpg", jpeg(8, 8)), ("a.txt", b"t"),
        ("b.left.webm", b"l"), ("b.right.webm", b"r"), ("b.txt", b"t"),
        ("c.mp4", b"x" * 30), ("c.txt", b"t"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    source = opened(path, ("txt",), source="webdataset", video="video", max_video_bytes=20)
    rows = all_rows(source)
    assert _videos(rows) == [(_ref(b"first"),), (_ref(b"l"), _ref(b"r")), "file_too_large"]
    assert not rows[0].images
    rows = all_rows(opened(path, (), source="webdataset", video="left.webm", image="image"))
    assert _videos(rows) == [(), (_ref(b"l"),), ()]
    assert [len(row.images) for row in rows] == [1, 0, 0]


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.webm", "c.jpg", "sub/d.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = all_rows(opened(tmp_path, None, source="folder", video="video"))
    assert [row.columns["file_name"] for row in rows] == ["a.webm", "b.MP4", "d.gif"]
    assert [row.videos[0].path for row in rows] == [
        str(tmp_path / name) for name in ("a.webm", "b.MP4", "sub/d.gif")
    ]
    assert not any(row.images for row in rows)
