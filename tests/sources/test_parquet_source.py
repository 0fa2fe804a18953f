"""Parquet rows: cells of every kind, ranges, ids, limits, damage, and bounded memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import EngineError, UserError
from pipeline.rows import ImageRef
from tests.helpers.pictures import jpeg
from tests.sources.input_files import all_rows, numbered, opened, write_parquet


def test_rows_in_order_with_ids_and_columns(tmp_path: Path) -> None:
    numbered(tmp_path / "b.parquet", 5)
    numbered(tmp_path / "a.parquet", 3)
    source = opened(tmp_path, ["text"], id="id")
    assert [(Path(f.path).name, f.num_rows) for f in source.files()] == [
        ("a.parquet", 3),
        ("b.parquet", 5),
    ]
    rows = all_rows(source)
    assert [r.row_id for r in rows] == ["r0", "r1", "r2", "r0", "r1", "r2", "r3", "r4"]
    assert rows[4].columns == {"id": "r1", "text": "text 1"}
    assert rows[4].images == (ImageRef(data=jpeg(8, 8, seed=1)),)
    assert source.schema().names == ["id", "text"]


def test_default_ids_are_file_and_row(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x.parquet", 10)
    rows = list(opened(path).read(path, 4, 7))
    assert [(r.row_id, r.index) for r in rows] == [
        ("x.parquet:4", 0),
        ("x.parquet:5", 1),
        ("x.parquet:6", 2),
    ]


@pytest.mark.parametrize("groups", [1, 3, 7, 100])
def test_any_range_of_any_row_groups(tmp_path: Path, groups: int) -> None:
    path = numbered(tmp_path / "x.parquet", 50, row_group_size=groups)
    source = opened(path, [], id="id")
    for start, stop in ((0, 50), (0, 0), (13, 14), (6, 30), (49, 50)):
        rows = list(source.read(path, start, stop))
        assert [r.row_id for r in rows] == [f"r{n}" for n in range(start, stop)]
        assert [r.index for r in rows] == list(range(stop - start))


def test_globs_lists_folders_and_their_order(tmp_path: Path) -> None:
    for name in ("train/2.parquet", "train/1.parquet", "deep/er/3.parquet", "_tmp/0.parquet"):
        numbered(tmp_path / name, 1)
    numbered(tmp_path / ".hidden.parquet", 1)

    def found(path: object) -> list[str]:
        return [os.path.relpath(f.path, tmp_path) for f in opened(path).files()]

    assert found(tmp_path) == ["deep/er/3.parquet", "train/1.parquet", "train/2.parquet"]
    assert found(tmp_path / "train/*.parquet") == ["train/1.parquet", "train/2.parquet"]
    assert found(tmp_path / "**/3.parquet") == ["deep/er/3.parquet"]
    assert found([tmp_path / "train/2.parquet", tmp_path / "train"]) == [
        "train/1.parquet",
        "train/2.parquet",
    ]


def test_nasty_folder_names(nasty_folder: Path) -> None:
    numbered(nasty_folder / "x.parquet", 2)
    assert len(all_rows(opened(nasty_folder))) == 2
    assert len(all_rows(opened(nasty_folder / "x.parquet"))) == 2


def test_image_cells_of_every_kind(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cases: list[tuple[Any, list[tuple[ImageRef, ...]]]] = [
        ([b"abc", None], [(ImageRef(data=b"abc"),), ()]),
        (["a.jpg", "", None], [(ImageRef(path="a.jpg"),), (), ()]),
        (
            pa.array(
                [{"bytes": b"x", "path": "p"}, {"bytes": None, "path": "p"}, None,
                 {"bytes": None, "path": None}], struct,
            ),
            [(ImageRef(data=b"x"),), (ImageRef(path="p"),), (), ()],
        ),
        ([["a", "b"], [], None], [(ImageRef(path="a"), ImageRef(path="b")), (), ()]),
        (
            pa.array([[{"bytes": b"x", "path": None}]], pa.list_(struct)),
            [(ImageRef(data=b"x"),)],
        ),
        (pa.array([b"abc"], pa.large_binary()), [(ImageRef(data=b"abc"),)]),
        (pa.array(["p"], pa.large_string()).dictionary_encode(), [(ImageRef(path="p"),)]),
        (pa.array([[b"a"]], pa.large_list(pa.binary())), [(ImageRef(data=b"a"),)]),
    ]  # fmt: skip
    for number, (cells, expected) in enumerate(cases):
        path = write_parquet(tmp_path / f"{number}.parquet", {"image": cells})
        rows = all_rows(opened(path))
        assert [r.images for r in rows] == expected
        assert all(r.error is None for r in rows)


def test_image_cells_that_make_no_sense(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([17], "bad_row"),
        ([[["a"]]], "bad_row"),
        ([["a", None]], "missing_image"),
        ([["a"] * 65], "too_many_images"),
        ([{"width": 3}], "bad_row"),
    ]
    for number, (cells, code) in enumerate(cases):
        path = write_parquet(tmp_path / f"{number}.parquet", {"image": cells})
        (row,) = all_rows(opened(path))
        assert row.error is not None
        assert row.error.code == code
        assert row.images == ()


def test_ids_of_every_type(tmp_path: Path) -> None:
    cases: list[tuple[Any, list[str]]] = [
        ([1, 2], ["1", "2"]),
        ([1.5], ["1.5"]),
        ([b"a\xff"], ["a\\xff"]),
        ([True], ["True"]),
    ]
    for number, (cells, expected) in enumerate(cases):
        path = write_parquet(tmp_path / f"{number}.parquet", {"key": cells})
        rows = all_rows(opened(path, id="key", image=None))
        assert [r.row_id for r in rows] == expected


def test_bad_and_repeated_ids_are_row_errors(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"key": ["a", "b", "a", None, "a"]})
    rows = all_rows(opened(path, id="key", image=None))
    codes = [r.error.code if r.error else None for r in rows]
    assert codes == [None, None, "duplicate_id", "bad_row", "duplicate_id"]
    assert rows[3].row_id == "x.parquet:3"


def test_text_that_is_not_utf8_ends_its_own_row_only(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"good too", None])
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    path = write_parquet(tmp_path / "x.parquet", {"text": text, "n": [1, 2, 3, 4]})
    rows = all_rows(opened(path, image=None))
    assert [r.columns["text"] for r in rows] == ["good", None, "good too", None]
    assert [r.error.code if r.error else None for r in rows] == [None, "bad_row", None, None]


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    dates = pa.array([0, 2**60], pa.timestamp("ms"))
    path = write_parquet(tmp_path / "x.parquet", {"when": dates})
    rows = all_rows(opened(path, image=None))
    assert rows[0].error is None
    assert rows[1].error is not None
    assert rows[1].error.code == "bad_row"


def test_only_needed_columns_are_read(tmp_path: Path) -> None:
    columns = {"image": [b"x"], "a": [1], "b": [2], "c": [3], "m": ["[]"], "k.dot": [5]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    (row,) = all_rows(opened(path, ["b"], keep=("k.dot",), messages="m"))
    assert row.columns == {"b": 2, "m": "[]", "k.dot": 5}
    assert row.messages == "[]"
    (row,) = all_rows(opened(path))
    assert set(row.columns) == {"a", "b", "c", "m", "k.dot"}
    (row,) = all_rows(opened(path, [], image=None))
    assert row.columns == {}
    assert row.images == ()


def test_limit_is_over_all_files(tmp_path: Path) -> None:
    numbered(tmp_path / "a.parquet", 3)
    numbered(tmp_path / "b.parquet", 5)
    numbered(tmp_path / "c.parquet", 5)
    files = opened(tmp_path, limit=5).files()
    assert [f.num_rows for f in files] == [3, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image": "imagee"}, ["input.image", "'imagee'", "did you mean 'image'"]),
        ({"id": "idd"}, ["input.id", "'idd'", "did you mean 'id'"]),
        ({"keep": ("txet",)}, ["input.keep[0]", "'text'"]),
        ({"image": "photo"}, ["input.image", "it has id, image, text", "null"]),
    ],
)
def test_missing_columns_name_the_nearest(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    path = numbered(tmp_path / "x.parquet", 2)
    with pytest.raises(UserError) as raised:
        opened(path, [], **settings).files()
    assert all(word in str(raised.value) for word in words)


def test_a_prompts_missing_column_is_named(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x.parquet", 2)
    with pytest.raises(UserError, match="the prompts' {titel}"):
        opened(path, ["titel"]).files()


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.parquet", "*.parquet", "empty"):
        with pytest.raises(UserError, match="input.path"):
            opened(tmp_path / path).files()


def test_a_file_that_is_no_parquet_or_has_lost_its_footer(tmp_path: Path) -> None:
    path = Path(numbered(tmp_path / "x.parquet", 20))
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[:-10], whole[: len(whole) // 2], b"PAR1" + bytes(40)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no readable Parquet file"):
            opened(path).files()


def test_damaged_row_group_fails_its_rows_only(tmp_path: Path) -> None:
    path = Path(numbered(tmp_path / "x.parquet", 30, row_group_size=10, compression="snappy"))
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xee" * column.total_compressed_size
    path.write_bytes(data)
    source = opened(path, ["text"], id="id")
    rows = list(source.read(str(path), 5, 30))
    assert [r.index for r in rows] == list(range(25))
    codes = [r.error.code if r.error else None for r in rows]
    assert codes == [None] * 5 + ["bad_row"] * 10 + [None] * 10
    assert rows[20].row_id == "r25"


def test_a_file_that_shrank_or_vanished_ends_the_attempt(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x.parquet", 5)
    source = opened(path)
    with pytest.raises(EngineError, match="fewer rows"):
        list(source.read(path, 0, 6))
    os.unlink(path)
    with pytest.raises(EngineError, match="cannot read"):
        list(source.read(path, 0, 5))


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    path = Path(numbered(tmp_path / "x.parquet", 40))
    (file,) = opened(path).files()
    other = tmp_path / "other" / "y.parquet"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    os.utime(other, (1, 1))
    (copied,) = opened(other).files()
    assert copied.fingerprint == file.fingerprint
    assert copied.num_bytes == path.stat().st_size
    numbered(path, 41)
    assert opened(path).files()[0].fingerprint != file.fingerprint
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    assert opened(other).files()[0].fingerprint != file.fingerprint


def test_an_fsspec_address(tmp_path: Path) -> None:
    import fsspec

    local = numbered(tmp_path / "x.parquet", 12, row_group_size=5)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/data/x.parquet", Path(local).read_bytes())
    memory.pipe_file("/data/_y.parquet", b"")
    try:
        for path in ("memory://data/*x.parquet", "memory://data", "memory://data/x.parquet"):
            source = opened(path, [], id="id")
            (file,) = source.files()
            assert file.path == "memory:///data/x.parquet" or file.path == "memory://data/x.parquet"
            rows = list(source.read(file.path, 3, 11))
            assert [r.row_id for r in rows] == [f"r{n}" for n in range(3, 11)]
        with pytest.raises(UserError, match="input.path"):
            opened("memory://data/nothing*").files()
        with pytest.raises(UserError, match="input.path"):
            opened("nosuchscheme://x").files()
    finally:
        memory.rm("/data", recursive=True)


def test_no_rows_at_all(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": pa.array([], pa.binary())})
    (file,) = opened(path).files()
    assert file.num_rows == 0
    assert all_rows(opened(path)) == []


MEASURE = """
import sys
from pipeline.settings import InputSettings
from pipeline.sources import open_source
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
source = open_source(InputSettings(path=sys.argv[1]))
(file,) = source.files()
list(source.read(file.path, 0, 1))
before = peak()
count = sum(len(row.images[0].data) > 0 for row in source.read(file.path, 0, file.num_rows))
print(count, (peak() - before) >> 10)
"""


@pytest.mark.parametrize("struct", [False, True])
def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path, struct: bool) -> None:
    rng = np.random.default_rng(0)
    cells: list[Any] = [rng.bytes(1 << 19) for _ in range(300)]  # 150 MB in one row group
    if struct:
        cells = [{"bytes": cell, "path": None} for cell in cells]
    path = write_parquet(
        tmp_path / "x.parquet",
        {"image": cells},
        compression="none",
        use_dictionary=False,
        write_batch_size=8,
        row_group_size=1000,
    )
    del cells
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True
    )
    count, grown_mb = map(int, done.stdout.split())
    assert count == 300
    assert grown_mb < 60


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_random_damage_ends_as_failed_rows_or_one_sentence(
    tmp_path: Path, compression: str
) -> None:
    """Of the footer above all: there pyarrow can end the whole process."""
    path = tmp_path / "x.parquet"
    whole = Path(numbered(path, 30, compression=compression, row_group_size=10)).read_bytes()
    rng = random.Random(compression)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for number in range(300):
        data = bytearray(whole)
        first = 0 if number % 3 == 0 else len(data) - footer
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(first, len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            source = opened(path, id="id")
            (file,) = source.files()
            rows = list(source.read(file.path, 0, file.num_rows))
        except (UserError, EngineError):
            continue
        assert len(rows) == file.num_rows
        assert {r.error.code for r in rows if r.error} <= {"bad_row", "duplicate_id"}
