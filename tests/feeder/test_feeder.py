"""The feeder keeps order, bounds memory, survives its workers and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import decode_pool, helper_process
from pipeline.arena import Arena
from pipeline.errors import EngineError, RowError
from pipeline.feeder import END, MAX_ITEMS_AHEAD, Fed, Feed, Feeder
from pipeline.images import decode
from pipeline.rows import Group, Prefix
from pipeline.spool import Spool
from tests.feeder.feed_items import (
    DEADLY,
    FRAGILE_BOOT,
    ONCE,
    SLOW,
    group,
    pictures,
    placed,
    prefix,
)
from tests.helpers.pictures import jpeg

PIXELS = 10**8
BYTES = 64 << 20
PAGES = 3 * 4096  # of an image: 64 * 48 * 3 bytes, rounded up by the arena


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that marked pictures bring down."""
    monkeypatch.setattr(helper_process, "_BOOT", FRAGILE_BOOT)


def take(feed: Feed, timeout: float = 30.0) -> Fed:
    fed = feed.get(timeout)
    assert isinstance(fed, Fed), fed
    return fed


def drain(feed: Feed) -> list[tuple[Any, list[Any]]]:
    """(item, copies of its images) of everything that is left."""
    found = []
    while (fed := feed.get(30.0)) is not END:
        assert fed is not None
        copies = [i.copy() if isinstance(i, np.ndarray) else i for i in fed.images]
        found.append((fed.item, copies))
        fed.release()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_pixels(spool: Spool, workers: int) -> None:
    first = prefix(placed(spool, jpeg(seed=90)))
    items: list[Prefix | Group] = [first, *pictures(spool, 30), group(30)]
    two = [placed(spool, jpeg(seed=50)), placed(spool, jpeg(40, 20, orientation=6), 20, 40)]
    items.append(group(31, *two))
    with Feeder(workers, BYTES, PIXELS, resize=False) as feeder:
        found = drain(feeder.feed(items))
    assert [item for item, _ in found] == items
    assert np.array_equal(found[0][1][0], decode(jpeg(seed=90), PIXELS))
    for number in range(30):
        assert np.array_equal(found[number + 1][1][0], decode(jpeg(seed=number), PIXELS))
    assert found[31][1] == []
    assert [image.shape for image in found[32][1]] == [(48, 64, 3), (40, 20, 3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_resize_is_pillows_bicubic(spool: Spool, workers: int) -> None:
    with Feeder(workers, BYTES, PIXELS, resize=True) as feeder:
        found = drain(feeder.feed(pictures(spool, 2)))
    image = Image.fromarray(decode(jpeg(seed=1), PIXELS))
    expected = np.asarray(image.resize((56, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(found[1][1][0], expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_errors_in_their_place(spool: Spool, workers: int) -> None:
    cut = jpeg(seed=3)[:-300]
    liar = placed(spool, jpeg(seed=4), 60, 48)
    items = [group(0, placed(spool, jpeg()), placed(spool, cut), liar), group(1)]
    with Feeder(workers, BYTES, PIXELS, resize=False) as feeder:
        (_, images), _ = drain(feeder.feed(items))
    assert isinstance(images[0], np.ndarray)
    assert isinstance(images[1], RowError)
    assert images[1].code == "truncated_image"
    assert isinstance(images[2], RowError)
    assert images[2].code == "corrupt_image"


def test_memory_is_bounded_and_given_back(spool: Spool) -> None:
    with Feeder(2, 4 * PAGES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(pictures(spool, 40))
        held = [take(feed) for _ in range(4)]
        assert feed.get(None) is None  # nothing can come before a release
        assert feed.get(0.01) is None
        kept = held[3].images[0].copy()
        held[0].release()
        held[0].release()  # twice is once
        held[0] = take(feed)
        assert feed.get(None) is None
        assert np.array_equal(held[3].images[0], kept)
        for fed in held:
            fed.release()
        assert len(drain(feed)) == 35
        assert feeder.stats()["peak_bytes"] <= 4 * PAGES
        assert feeder.arena is not None
        assert feeder.arena.num_used == 0


def test_an_item_larger_than_the_memory_goes_alone(spool: Spool) -> None:
    many = [placed(spool, jpeg(seed=s)) for s in range(20)]
    items = [group(0, many[0]), group(1, *many), group(2, many[1]), group(3, *many[:10])]
    with Feeder(2, 4 * PAGES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(items)
        first = take(feed)
        assert feed.get(0.2) is None
        first.release()
        large = take(feed)
        assert len(large.images) == 20
        for number, image in enumerate(large.images):
            assert np.array_equal(image, decode(jpeg(seed=number), PIXELS))
        assert feed.get(0.2) is None
        large.release()
        found = drain(feed)
    assert [item for item, _ in found] == items[2:]
    assert all(np.array_equal(a, decode(jpeg(seed=n), PIXELS)) for n, a in enumerate(found[1][1]))


def test_a_release_beside_a_full_memory_is_not_missed(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room comes back between the producer's look at the memory and its word that it is full."""
    plain = Arena._try

    def slow_to_tell(arena: Arena, num_bytes: int) -> Any:
        room = plain(arena, num_bytes)
        if room is None:
            time.sleep(0.2)
        return room

    monkeypatch.setattr(Arena, "_try", slow_to_tell)
    with Feeder(1, PAGES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(pictures(spool, 3))
        first = take(feed)
        time.sleep(0.05)
        first.release()
        assert len(drain(feed)) == 2


def test_items_are_walked_lazily() -> None:
    walked = 0

    def endless() -> Iterator[Group]:
        nonlocal walked
        while True:
            walked += 1
            yield group(walked)

    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(endless())
        take(feed)
        time.sleep(0.2)
        assert walked <= MAX_ITEMS_AHEAD + 2
        feed.close()


def test_an_error_of_the_items_follows_the_items_before_it(spool: Spool) -> None:
    def failing() -> Iterator[Group]:
        yield from pictures(spool, 3)
        raise KeyError("broken plan")

    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(failing())
        for _ in range(3):
            take(feed).release()
        with pytest.raises(KeyError, match="broken plan"):
            feed.get(10.0)


def test_a_spool_that_is_gone_ends_the_attempt(spool: Spool) -> None:
    items = pictures(spool, 1)
    spool.forget("shard")
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(items)
        with pytest.raises(EngineError, match="spool"):
            feed.get(30.0)


def test_killed_workers_are_replaced_and_no_item_is_lost(spool: Spool, fragile: None) -> None:
    items = pictures(spool, 60, SLOW)
    # NOTE: eight pictures ahead and no more, so that there is work left whenever a worker dies.
    with Feeder(2, 8 * PAGES, PIXELS, resize=False) as feeder:
        assert feeder.pool is not None
        feed = feeder.feed(items)
        found = []
        for number in range(60):
            fed = take(feed)
            found.append((fed.item, fed.images[0].copy()))
            fed.release()
            if number in (3, 20, 35):
                os.kill(feeder.pool.pids[number % 2], signal.SIGKILL)
        assert feed.get(10.0) is END
        assert feeder.stats()["replaced_workers"] == 3
    assert [item for item, _ in found] == items
    for number, (_, image) in enumerate(found):
        assert np.array_equal(image, decode(jpeg(seed=number), PIXELS))


def test_a_picture_that_kills_once_is_done_again(
    spool: Spool, fragile: None, tmp_path: Path
) -> None:
    marker = str(tmp_path / "died").encode()
    items = [group(n, placed(spool, jpeg(seed=n) + ONCE + marker)) for n in range(6)]
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        found = drain(feeder.feed(items))
        assert feeder.stats()["replaced_workers"] == 1
    assert all(isinstance(images[0], np.ndarray) for _, images in found)


def test_a_picture_that_kills_twice_is_a_row_error(spool: Spool, fragile: None) -> None:
    items = pictures(spool, 12)
    items[5] = group(5, placed(spool, jpeg(seed=5) + DEADLY), placed(spool, jpeg(seed=6)))
    with Feeder(2, BYTES, PIXELS, resize=False) as feeder:
        found = drain(feeder.feed(items))
        assert feeder.stats()["replaced_workers"] == 2
    assert [item for item, _ in found] == items
    for number, (_, images) in enumerate(found):
        if number != 5:
            assert np.array_equal(images[0], decode(jpeg(seed=number), PIXELS))
    assert isinstance(found[5][1][0], RowError)
    assert found[5][1][0].code == "worker_crash"
    assert np.array_equal(found[5][1][1], decode(jpeg(seed=6), PIXELS))


def test_a_picture_that_never_ends_is_stopped(
    spool: Spool, fragile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "TASK_TIMEOUT_SEC", 0.3)
    items = [group(0, placed(spool, jpeg() + b"stuck")), group(1, placed(spool, jpeg(seed=1)))]
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        found = drain(feeder.feed(items))
    assert isinstance(found[0][1][0], RowError)
    assert found[0][1][0].code == "worker_crash"
    assert isinstance(found[1][1][0], np.ndarray)


def test_workers_that_cannot_start_end_the_attempt(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_process, "_BOOT", "raise SystemExit(1)")
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        feed = feeder.feed(pictures(spool, 2))
        with pytest.raises(EngineError, match="do not start"):
            feed.get(30.0)


def test_signals_to_the_group_leave_workers_alone(spool: Spool, fragile: None) -> None:
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        assert feeder.pool is not None
        feed = feeder.feed(pictures(spool, 20, SLOW))
        take(feed).release()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(feeder.pool.pids[0], number)
        assert len(drain(feed)) == 19
        assert feeder.stats()["replaced_workers"] == 0


def test_one_feed_after_the_other_and_a_close_in_the_middle(spool: Spool, fragile: None) -> None:
    with Feeder(2, BYTES, PIXELS, resize=False) as feeder:
        assert feeder.arena is not None
        for _ in range(3):
            feed = feeder.feed(pictures(spool, 25, SLOW))
            kept = take(feed)
            feed.close()
            assert kept.images[0].shape == (48, 64, 3)
            assert feeder.arena.num_used == PAGES
            kept.release()
            assert feeder.arena.num_used == 0
        assert len(drain(feeder.feed(pictures(spool, 25)))) == 25


def test_close_ends_processes_threads_and_memory(spool: Spool) -> None:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    feeder = Feeder(2, BYTES, PIXELS, resize=False)
    assert feeder.pool is not None
    pids = feeder.pool.pids
    feed = feeder.feed(pictures(spool, 10))
    fed = take(feed)
    image = fed.images[0]
    feed.close()
    feeder.close()
    assert image.sum() > 0  # an array that is still held keeps its memory
    del image, fed, feed, feeder
    gc.collect()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive(), thread
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # the spool's file


def test_workers_go_with_a_killed_parent() -> None:
    import subprocess
    import sys

    code = (
        "import os, time\n"
        "from pipeline.feeder import Feeder\n"
        "feeder = Feeder(2, 1 << 20, 10**8, False)\n"
        "time.sleep(1)\n"
        "print(*feeder.pool.pids, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
