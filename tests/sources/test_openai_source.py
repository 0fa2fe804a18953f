"""Chat requests as JSON lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EngineError, UserError
from pipeline.sources import openai_batch
from tests.sources.input_files import all_rows, opened, write_lines


def _turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_batch_requests(tmp_path: Path) -> None:
    records = [
        {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "m", "messages": _turns(f"hello {n}"), "max_tokens": 5}}
        for n in range(6)
    ]  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", records)
    source = opened(path, source="openai")
    assert source.settings.messages == "messages"
    (file,) = source.files()
    assert file.num_rows == 6
    rows = list(source.read(path, 2, 5))
    assert [(r.row_id, r.index) for r in rows] == [("q2", 0), ("q3", 1), ("q4", 2)]
    assert rows[0].messages == _turns("hello 2")
    assert rows[0].columns["max_tokens"] == 5
    assert "custom_id" in source.schema().names
    (row,) = list(opened(path, [], source="openai", keep=("model",)).read(path, 0, 1))
    assert set(row.columns) == {"messages", "model"}


def test_plain_messages_images_and_bad_lines(tmp_path: Path) -> None:
    records = [
        {"messages": _turns("a"), "image": "a.jpg"}, "", "{broken", "[1, 2]",
        {"body": {"messages": _turns("b")}, "custom_id": 7}, '{"messages": [' * 3000,
        {"messages": _turns("c"), "custom_id": "same"}, {"messages": [], "custom_id": "same"},
    ]  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", records)
    rows = all_rows(opened(path, source="openai"))
    codes = [r.error.code if r.error else None for r in rows]
    assert codes == [None, "bad_row", "bad_row", None, "bad_row", None, "duplicate_id"]
    assert rows[0].images[0].path == "a.jpg"
    assert rows[0].row_id == "x.jsonl:0"
    assert rows[3].row_id == "x.jsonl:3"
    assert rows[3].messages == _turns("b")


def test_not_utf8_and_too_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n{"a": 1}\n{"b": "' + b"x" * 500 + b'"}\n{"c": 1}')
    monkeypatch.setattr(openai_batch, "MAX_LINE_BYTES", 100)
    source = opened(path, source="openai")
    rows = all_rows(source)
    assert [r.error.code if r.error else None for r in rows] == ["bad_row", None, "bad_row", None]
    with pytest.raises(EngineError, match="fewer lines"):
        list(source.read(str(path), 0, 5))


def test_compressed_lines_and_fingerprints(tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "x.jsonl", [{"messages": _turns("a")}]))
    packed = tmp_path / "y.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    files = opened([path, packed], source="openai").files()
    assert [f.num_rows for f in files] == [1, 1]
    assert files[0].fingerprint == files[1].fingerprint
    assert len(list(opened(packed, source="openai").read(str(packed), 0, 1))) == 1
    packed.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        opened(packed, source="openai").files()


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n\n")
    source = opened(path, source="openai")
    assert source.files()[0].num_rows == 0
    assert list(source.read(str(path), 0, 0)) == []
    assert source.schema().names == []


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_shard_far_behind_is_found_without_reading_what_is_before(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"custom_id": f"c{n}", "messages": []}) for n in range(3500)]
    lines[1000:1000] = ["", "  "]
    text = "\n".join(lines).encode()
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    source = opened(path, source="openai", image=None)
    (file,) = source.files()
    assert file.num_rows == 3500
    seen: list[int] = []
    original = openai_batch._lines

    def counted(path: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        for item in original(path, offset):
            seen.append(item[0])
            yield item

    monkeypatch.setattr(openai_batch, "_lines", counted)
    for start, stop in ((0, 3), (998, 1003), (2000, 2002), (3499, 3500)):
        seen.clear()
        rows = list(source.read(file.path, start, stop))
        assert [row.row_id for row in rows] == [f"c{n}" for n in range(start, stop)]
        assert [row.index for row in rows] == list(range(stop - start))
        assert len(seen) <= 1000 + stop - start
