"""Inputs on S3: ranges, listings, versions, and a store that fails on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import images, stores
from pipeline.errors import EngineError, RowError, UserError
from tests.helpers.pictures import jpeg
from tests.helpers.s3_server import S3, environment, s3_server
from tests.sources.input_files import all_rows, numbered, opened, write_parquet, write_tar

pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(server: S3, monkeypatch: pytest.MonkeyPatch) -> Any:
    import s3fs

    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(stores, "PAUSE_SEC", 0.001)
    server.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()


def test_parquet_reads_only_what_it_needs(server: S3, store: Any, tmp_path: Path) -> None:
    local = write_parquet(
        tmp_path / "x.parquet",
        {"id": [f"r{n}" for n in range(40)], "image": [bytes([n]) * 100_000 for n in range(40)]},
        row_group_size=10,
        compression="none",
    )
    store.pipe_file("bucket/p/x.parquet", Path(local).read_bytes())
    store.pipe_file("bucket/p/_SUCCESS", b"")
    source = opened("s3://bucket/p", [], id="id")
    (file,) = source.files()
    assert (file.path, file.num_rows) == ("s3://bucket/p/x.parquet", 40)
    server.requests.clear()
    rows = list(source.read(file.path, 21, 24))
    assert [r.row_id for r in rows] == ["r21", "r22", "r23"]
    assert rows[0].images[0].data == bytes([21]) * 100_000
    assert server.count("GET", "x.parquet") < 12
    store.pipe_file("bucket/p/x.parquet", Path(local).read_bytes())
    assert len(list(source.read(file.path, 21, 24))) == 3  # written anew, the same
    before = file.fingerprint
    assert source.files()[0].fingerprint == before
    numbered(tmp_path / "y.parquet", 3)
    store.pipe_file("bucket/p/x.parquet", (tmp_path / "y.parquet").read_bytes())
    with pytest.raises(UserError, match="changed while the job ran"):
        list(source.read(file.path, 1, 3))
    assert source.files()[0].fingerprint != before


def test_other_formats_and_paths_in_rows(store: Any, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(8, 8)), ("a.txt", b"hello")])
    store.pipe_file("bucket/w/x.tar", Path(tar).read_bytes())
    store.pipe_file("bucket/f/a.jpg", jpeg(8, 8))
    store.pipe_file("bucket/o/x.jsonl", b'{"custom_id": "a", "body": {"messages": []}}\n')
    (row,) = all_rows(opened("s3://bucket/w/*.tar", source="webdataset"))
    assert row.columns["txt"] == "hello"
    (row,) = all_rows(opened("s3://bucket/o", source="openai"))
    assert row.row_id == "a"
    source = opened("s3://bucket/f", source="folder")
    (row,) = all_rows(source)
    assert images.load(row.images[0], source.settings) == jpeg(8, 8)


def test_a_store_that_fails_ends_the_attempt_not_the_row(
    server: S3, store: Any, tmp_path: Path
) -> None:
    local = numbered(tmp_path / "x.parquet", 20, compression="none")
    store.pipe_file("bucket/e/x.parquet", Path(local).read_bytes())
    source = opened("s3://bucket/e/x.parquet", id="id")
    (file,) = source.files()
    for kind in ("AccessDenied", "cut"):
        server.fail("GET", "e/x.parquet", kind, times=50)
        with pytest.raises(EngineError, match="cannot read"):
            list(source.read(file.path, 0, 20))
        server.faults.clear()
        server.fail("GET", "e/x.parquet", kind if kind == "cut" else "SlowDown", times=3)
        assert len(list(source.read(file.path, 0, 20))) == 20
        assert not server.faults
        assert len(source.files()) == 1


def test_missing_buckets_and_pictures(store: Any) -> None:
    with pytest.raises(UserError, match="input.path"):
        opened("s3://no-such-bucket/x.parquet").files()
    settings = opened("s3://bucket").settings
    from pipeline.rows import ImageRef

    with pytest.raises(RowError) as raised:
        images.load(ImageRef(path="s3://bucket/nothing.jpg"), settings)
    assert raised.value.code == "missing_file"
