"""A part file: it says what it is, and any byte that changed shows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.part import PartDamaged, PartInfo, check_part, read_info, read_part, write_part

INFO = PartInfo("shard-00000001", "a1", "fp", 3, {"ok": 3}, input={"path": "in.parquet"})
TABLE = pa.table({"row_id": ["a", "b", "c"], "caption": ["x", None, "é"]})


def make(folder: Path, table: pa.Table = TABLE, info: PartInfo = INFO) -> Path:
    path = folder / "p.parquet"
    write_part(path, table, info)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("part")).read_bytes()


def test_a_part_tells_what_it_is(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert check_part(path) == INFO == check_part(path.read_bytes()) == read_info(path)
    assert read_part(path).to_pydict() == TABLE.to_pydict()
    assert pq.read_table(path).to_pydict() == TABLE.to_pydict()
    assert pq.ParquetFile(path).schema_arrow.names == ["row_id", "caption"]


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_shows(data: bytes, at: int, bit: int) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] ^= 1 << bit
    with pytest.raises(PartDamaged):
        check_part(bytes(damaged))


@given(cut=st.integers(0, 10**6), junk=st.binary(max_size=9))
def test_any_cut_or_longer_file_shows(data: bytes, cut: int, junk: bytes) -> None:
    other = data[: cut % (len(data) + 1)] + junk
    if other != data:
        with pytest.raises(PartDamaged):
            check_part(other)


def test_an_empty_shard_has_a_part(tmp_path: Path) -> None:
    info = PartInfo("shard-00000001", "a1", "fp", 0, {"ok": 0})
    path = make(tmp_path, TABLE.slice(0, 0), info)
    assert check_part(path).num_rows == 0
    assert read_part(path).num_rows == 0


def test_a_foreign_parquet_file_is_no_part(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "x.parquet")
    with pytest.raises(PartDamaged, match="no digest"):
        check_part(tmp_path / "x.parquet")
    with pytest.raises(PartDamaged, match="footer cannot be read"):
        read_info(tmp_path / "x.parquet")
    (tmp_path / "empty").touch()
    with pytest.raises(PartDamaged, match="empty"):
        check_part(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_info(tmp_path / "none")


def test_row_counts_must_agree(tmp_path: Path) -> None:
    path = make(tmp_path, info=PartInfo("shard-00000001", "a1", "fp", 4, {"ok": 4}))
    with pytest.raises(PartDamaged, match="holds 3 rows and says 4"):
        check_part(path)


def test_answers_that_look_like_a_digest_do_no_harm(tmp_path: Path) -> None:
    text = "vlm_batch.digest\x18\x20" + "0" * 32
    table = pa.table({"caption": [text] * 3})
    info = PartInfo("shard-00000001", text, "fp", 3, {}, input={"path": text})
    assert check_part(make(tmp_path, table, info)) == info


def test_large_tables_become_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.part._ROW_GROUP_BYTES", 10_000)
    table = pa.table({"caption": ["x" * 100] * 1000})
    path = make(tmp_path, table, PartInfo("shard-00000001", "a1", "fp", 1000, {}))
    assert pq.ParquetFile(path).num_row_groups > 5
    assert check_part(path).num_rows == 1000
