"""Recordings from every source: cells of every kind, a chosen extension, files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.prompts import message_turns
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, opened, write_lines, write_parquet, write_tar

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _audios(rows: list[Row]) -> list[tuple[ImageRef, ...] | str]:
    return [row.audios if row.error is None else row.error.code for row in rows]


def _ref(data: bytes | None = None, path: str | None = None) -> ImageRef:
    return ImageRef(data, path, "audio")


def test_an_audio_column_means_no_image_column() -> None:
    assert InputSettings(path="x", audio="said").image is None
    assert InputSettings(path="x", audio="said", image="image").image == "image"


def test_cells(tmp_path: Path) -> None:
    cells = [{"bytes": b"one", "path": "a.wav"}, {"bytes": None, "path": "a/b.mp3"}, None]
    path = write_parquet(tmp_path / "a.parquet", {"said": pa.array(cells, STRUCT)})
    rows = all_rows(opened(path, (), audio="said"))
    assert _audios(rows) == [(_ref(b"one"),), (_ref(path="a/b.mp3"),), ()]
    listed = pa.array([[b"a", b"b"], [b"a"] * 9, [None]], pa.list_(pa.binary()))
    path = write_parquet(tmp_path / "b.parquet", {"said": listed, "image": ["x.jpg"] * 3})
    rows = all_rows(opened(path, (), audio="said", image="image"))
    assert _audios(rows) == [(_ref(b"a"), _ref(b"b")), "too_many_audios", "missing_audio"]
    assert rows[0].images == (ImageRef(path="x.jpg"),)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"audios": ["x"]})
    with pytest.raises(UserError, match=r"input\.audio names the column 'audio'.*'audios'"):
        opened(path, (), audio="audio").files()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_with_the_hubs_audio_feature(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = {"said": {"_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"said": pa.array([{"bytes": b"v", "path": "v.wav"}], STRUCT), "text": ["t"]})
    (tmp_path / "set").mkdir()
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set/train.parquet")
    source = opened(tmp_path / "set", ("text",), source="hf", audio="said", streaming=streaming)
    (row,) = all_rows(source)
    assert row.audios == (_ref(b"v"),)
    assert dict(row.columns) == {"text": "t"}


def test_requests_bring_recordings(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]}]
    line: dict[str, Any] = {"custom_id": "a", "body": {"messages": talk}, "said": "x.wav"}
    path = write_lines(tmp_path / "a.jsonl", [line])
    (row,) = all_rows(opened(path, None, source="openai", audio="said"))
    assert row.audios == (_ref(path="x.wav"),)
    turns, media = message_turns(row, None)
    assert media == (_ref(path="x.wav"),)
    assert turns[0].parts == (0, "?")


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "audio_url", "audio_url": {"url": "http://x/a.mp3"}}, "http://x/a.mp3"),
        ({"type": "audio", "audio": "a.flac"}, "a.flac"),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
            "data:audio/mp3;base64,AAAA",
        ),
    ],
)
def test_parts_of_messages(part: dict[str, Any], path: str) -> None:
    messages = [{"role": "user", "content": [part, part]}]
    turns, media = message_turns(Row("a", 0, {}, messages=messages), None)
    assert media == (_ref(path=path), _ref(path=path))
    assert turns[0].parts == (0, 1)


def test_samples_of_a_tar(tmp_path: Path) -> None:
    members = [
        ("a.wav", b"first"), ("a.jpg", jpeg(8, 8)), ("a.txt", b"t"),
        ("b.left.flac", b"l"), ("b.right.MP3", b"r"), ("b.txt", b"t"),
        ("c.mp3", b"x" * 30), ("c.txt", b"t"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    source = opened(path, ("txt",), source="webdataset", audio="audio", max_audio_bytes=20)
    rows = all_rows(source)
    assert _audios(rows) == [(_ref(b"first"),), (_ref(b"l"), _ref(b"r")), "file_too_large"]
    assert not rows[0].images
    rows = all_rows(opened(path, (), source="webdataset", audio="left.flac", image="image"))
    assert _audios(rows) == [(), (_ref(b"l"),), ()]
    assert [len(row.images) for row in rows] == [1, 0, 0]


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.MP3", "a.wav", "c.jpg", "sub/d.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = all_rows(opened(tmp_path, None, source="folder", audio="audio"))
    assert [row.columns["file_name"] for row in rows] == ["a.wav", "b.MP3", "d.flac"]
    assert [row.audios[0].path for row in rows] == [
        str(tmp_path / name) for name in ("a.wav", "b.MP3", "sub/d.flac")
    ]
    assert not any(row.images for row in rows)
