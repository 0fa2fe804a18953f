"""A file that has only grown is told from one that was changed, in every format that grows."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.sources.base import Source
from tests.helpers.pictures import jpeg
from tests.sources.input_files import opened

Write = Callable[[Path, range, int], None]  # rows, and a seed of their content


def _parquet(path: Path, rows: range, seed: int) -> None:
    """A writer that copies what was there, as one that appends row groups does."""
    with pq.ParquetWriter(path, pa.schema([("id", pa.string())])) as writer:
        for number in rows:
            writer.write_table(pa.table({"id": [f"{seed} {number}"]}))


def _lines(path: Path, rows: range, seed: int) -> None:
    lines = (json.dumps({"custom_id": f"{seed} {n}", "messages": []}) for n in rows)
    path.write_text("\n".join(lines))


def _tar(path: Path, rows: range, seed: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in rows:
            info = tarfile.TarInfo(f"{number:03}.txt")
            data = f"{seed} {number}".encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _folder(path: Path, rows: range, seed: int) -> None:
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for number in rows:
        (path / f"{number:03}.jpg").write_bytes(jpeg(8, 8 + seed))


CASES: dict[str, tuple[str, str, Write]] = {
    "parquet": ("parquet", "x.parquet", _parquet),
    "openai": ("openai", "x.jsonl", _lines),
    "webdataset": ("webdataset", "x.tar", _tar),
    "folder": ("folder", "x", _folder),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Source, Write]:
    kind, name, write = CASES[request.param]
    image = "image" if kind == "folder" else None
    write(tmp_path / name, range(6), 1)
    return tmp_path / name, opened(tmp_path / name, source=kind, image=image), write


def test_rows_behind_are_growth_and_others_are_a_change(
    case: tuple[Path, Source, Write],
) -> None:
    path, source, write = case
    (before,) = source.files()
    assert source.still_holds(before.path, before.fingerprint)
    write(path, range(9), 1)
    (grown,) = source.files()
    assert (before.num_rows, grown.num_rows) == (6, 9)
    assert grown.fingerprint != before.fingerprint
    assert source.still_holds(before.path, before.fingerprint)
    for rows, seed in ((range(9), 20), (range(1, 9), 1), (range(5), 1), (range(6), 20)):
        write(path, rows, seed)
        assert not source.still_holds(before.path, before.fingerprint), (rows, seed)


def test_a_change_under_way_is_noticed_before_the_last_row(
    case: tuple[Path, Source, Write],
) -> None:
    path, source, write = case
    (file,) = source.files()
    write(path, range(6), 1)  # written anew, the same
    assert len(list(source.read(file.path, 0, 6))) == 6
    rows = source.read(file.path, 0, 6)
    next(rows)
    write(path, range(9), 1)  # rows behind do no harm
    assert len(list(rows)) == 5
    rows = source.read(file.path, 0, 6)
    seen = [next(rows)]
    write(path, range(6), 20)
    with pytest.raises(UserError, match="changed while the job ran"):
        seen.extend(rows)
    assert len(seen) < 6
    with pytest.raises(UserError, match="changed while the job ran"):
        next(source.read(file.path, 0, 6))
