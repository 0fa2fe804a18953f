"""Images are loaded ahead of their rows, many at a time, each once, and only for wanted rows."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import images, prefetch
from pipeline.errors import RowError
from pipeline.prefetch import ImageLoader
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings

SETTINGS = InputSettings(path="x")


@pytest.fixture
def loader() -> Iterator[ImageLoader]:
    made = ImageLoader(SETTINGS)
    yield made
    made.close()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the loads of each address; every one takes 20 ms and gives 1,000 bytes."""
    counts: Counter[str] = Counter()

    def load(ref: ImageRef, settings: InputSettings) -> bytes:
        counts[str(ref.path)] += 1
        time.sleep(0.02)
        return bytes(1000)

    monkeypatch.setattr(images, "load", load)
    return counts


def _row(number: int, *paths: str, messages: object = None, error: RowError | None = None) -> Row:
    refs = tuple(ImageRef(path=path) for path in paths)
    return Row(f"r{number}", number, {}, refs, messages, error)


def test_order_bytes_and_errors(loader: ImageLoader, tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(60)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(b"picture %d" % number)
    rows = [_row(n, paths[n]) for n in range(60)]
    rows[7] = _row(7, f"{tmp_path}/nothing")
    rows[8] = _row(8)
    rows[9] = _row(9, paths[9], error=RowError("bad_row"))
    for number, row in enumerate(loader.ahead(rows, lambda row: row.index != 5)):
        assert row is rows[number]
        if number == 7:
            with pytest.raises(RowError) as raised:
                loader.load(row.images[0])
            assert raised.value.code == "missing_file"
        elif row.images:
            assert loader.load(row.images[0]) == b"picture %d" % number
    assert loader.load(ImageRef(data=b"own")) == b"own"


def test_many_at_a_time_and_not_far_ahead(loader: ImageLoader, loads: Counter[str]) -> None:
    walked = 0

    def rows() -> Iterator[Row]:
        nonlocal walked
        for number in range(200):
            walked += 1
            yield _row(number, f"a{number}")

    threads = threading.active_count()
    began = time.monotonic()
    stream = loader.ahead(rows(), lambda row: True)
    for _ in range(64):
        loader.load(next(stream).images[0])
    assert time.monotonic() - began < 64 * 0.02
    assert walked <= 64 + prefetch.MAX_ROWS_AHEAD + 1
    assert set(loads.values()) == {1}
    stream.close()  # type: ignore[attr-defined]
    loader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert len(loads) <= 64 + prefetch.MAX_ROWS_AHEAD + 1


def test_nothing_for_what_is_done_and_one_load_for_many_rows(
    loader: ImageLoader, loads: Counter[str]
) -> None:
    rows = [_row(n, "same" if n % 2 else "unwanted") for n in range(20)]
    for row in loader.ahead(rows, lambda row: row.index % 2 == 1):
        if row.index % 2:
            loader.load(row.images[0])
    assert loads == {"same": 1}


def test_messages_name_what_is_loaded(loader: ImageLoader, loads: Counter[str]) -> None:
    part = {"type": "image_url", "image_url": {"url": "named"}}
    inline = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    rows = [
        _row(0, "unused", messages=[{"role": "user", "content": [part, inline]}]),
        _row(1, "unused", messages="no JSON"),
    ]
    for _ in loader.ahead(rows, lambda row: True):
        time.sleep(0.05)
    assert loads == {"named": 1}


def test_memory_is_bounded(
    loader: ImageLoader, loads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "MAX_HELD_BYTES", 3000)
    rows = [_row(n, *(f"{n}-{i}" for i in range(20))) for n in range(10)]
    for row in loader.ahead(rows, lambda row: True):
        time.sleep(0.05)
        assert loader._held_bytes <= 3000 + prefetch.NUM_THREADS * 1000
        for ref in row.images:
            assert loader.load(ref) == bytes(1000)
    assert loader._held_bytes == 0
    assert set(loads.values()) == {1}
