"""Random damage in lines and archives, compressed or not: failed rows or one sentence."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import EngineError, UserError
from tests.helpers.pictures import jpeg
from tests.sources.input_files import opened

CODES = {"bad_row", "duplicate_id", "missing_image", "file_too_large"}


def _lines() -> bytes:
    turns = [{"role": "user", "content": "hello"}]
    records = ({"custom_id": f"c{n}", "body": {"messages": turns}} for n in range(10))
    return "\n".join(map(json.dumps, records)).encode()


def _tar() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(5):
            for kind, data in (("jpg", jpeg(8, 8)), ("txt", b"hello"), ("json", b'{"a": 1}')):
                info = tarfile.TarInfo(f"{number:03}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()


def _damaged(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice((1, 2, 5))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.tar", "x.tar.gz"])
def test_no_damage_is_a_traceback(tmp_path: Path, name: str) -> None:
    kind = "openai" if "jsonl" in name else "webdataset"
    plain = _lines() if kind == "openai" else _tar()
    whole = gzip.compress(plain) if name.endswith(".gz") else plain
    rng = random.Random(name)
    path = tmp_path / name
    for _ in range(150):
        path.write_bytes(_damaged(whole, rng))
        source = opened(path, source=kind, image=None if kind == "openai" else "image")
        try:
            source.schema()
            (file,) = source.files()
            rows = list(source.read(file.path, 0, file.num_rows))
            path.write_bytes(_damaged(whole, rng))
            source.still_holds(file.path, file.fingerprint)
        except (UserError, EngineError):
            continue
        assert len(rows) == file.num_rows
        assert {row.error.code for row in rows if row.error} <= CODES
