"""Samples of tar files: their grouping, their pictures, their columns, their troubles."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import EngineError, UserError
from pipeline.rows import ImageRef
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, opened, write_tar


def _samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for n in range(first, first + count):
        meta = json.dumps({"n": n, "caption": f"c{n}"}).encode()
        members += [(f"d/{n:05}.jpg", jpeg(8, 8, seed=n)), (f"d/{n:05}.json", meta)]
        members.append((f"d/{n:05}.txt", f"text {n}".encode()))
    return members


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_samples_are_rows(tmp_path: Path, name: str, mode: str) -> None:
    path = write_tar(tmp_path / name, _samples(12), mode)
    source = opened(path, source="webdataset", id="__key__")
    (file,) = source.files()
    assert file.num_rows == 12
    assert set(source.schema().names) == {"__key__", "n", "caption", "txt"}
    rows = list(source.read(path, 3, 9))
    assert [r.row_id for r in rows] == [f"d/{n:05}" for n in range(3, 9)]
    assert [r.index for r in rows] == list(range(6))
    assert rows[0].columns == {"__key__": "d/00003", "n": 3, "caption": "c3", "txt": "text 3"}
    assert rows[0].images == (ImageRef(data=jpeg(8, 8, seed=3)),)


def test_several_pictures_and_a_chosen_extension(tmp_path: Path) -> None:
    members = [
        ("a.left.jpg", b"L"), ("a.right.png", b"R"), ("a.cls", b"7"), ("b.txt", b"no picture"),
        ("readme", b"ignored"), ("c.left.jpg", b"1"), ("c.left.jpg", b"2"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    rows = all_rows(opened(path, source="webdataset"))
    assert [[ref.data for ref in r.images] for r in rows] == [[b"L", b"R"], [], [b"1"], [b"2"]]
    assert rows[0].columns["cls"] == "7"
    rows = all_rows(opened(path, source="webdataset", image="right.png"))
    assert [len(r.images) for r in rows] == [1, 0, 0, 0]
    rows = all_rows(opened(path, source="webdataset", image=None))
    assert not any(r.images for r in rows)


def test_bad_members_end_their_own_row(tmp_path: Path) -> None:
    members = [
        ("a.json", b"{broken"), ("b.txt", b"\xff\xfe"), ("c.jpg", bytes(2000)), ("d.json", b"[1]"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    rows = all_rows(opened(path, source="webdataset", max_bytes=1000))
    codes = [r.error.code if r.error else None for r in rows]
    assert codes == ["bad_row", "bad_row", "file_too_large", None]
    assert rows[3].columns["json"] == [1]


def test_links_and_folders_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("dir.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_tar(tmp_path / "y.tar", _samples(1))
    files = opened(tmp_path / "*.tar", source="webdataset").files()
    assert [f.num_rows for f in files] == [0, 1]


def test_cut_and_foreign_files(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "x.tar", _samples(5)))
    whole = path.read_bytes()
    source = opened(path, source="webdataset")
    path.write_bytes(whole[:3000])
    with pytest.raises(UserError, match="no readable tar"):
        source.files()
    with pytest.raises(EngineError, match="cannot read"):
        list(source.read(str(path), 0, 5))
    path.write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="no readable tar"):
        source.files()


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", _samples(5))
    two = write_tar(tmp_path / "2.tar", _samples(5))
    three = write_tar(tmp_path / "3.tar", _samples(5, first=1))
    marks = [f.fingerprint for f in opened([one, two, three], source="webdataset").files()]
    assert marks[0] == marks[1] != marks[2]
