"""Videos through the feeder: their frames, and workers that die or hang at one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import decode_pool, helper_process
from pipeline.errors import RowError
from pipeline.feeder import END, Fed, Feeder
from pipeline.rows import Clip, EncodedImage, Group, ImageLayout, PlacedImage, View
from pipeline.spool import Spool
from pipeline.video import Limits, read_frames
from tests.feeder.feed_items import group, placed
from tests.helpers.pictures import jpeg
from tests.helpers.videos import number_of, video

BYTES, PIXELS = 8 << 20, 10**6
FRAMES = (1, 4, 4, 11)
FRAGILE = helper_process._BOOT.replace(
    "main(",
    """
import os, time
from pipeline import decode_worker
plain = decode_worker.read_frames
def read_frames(data, wanted, limits):
    for count, found in enumerate(plain(data, wanted, limits)):
        if count == 2 and data.endswith(b"deadly"):
            os.kill(os.getpid(), 9)
        if count == 2 and b"once:" in data:
            marker = data.split(b"once:")[1].decode()
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), 9)
        if count == 2 and data.endswith(b"stuck"):
            time.sleep(1000)
        if data.endswith(b"slow"):
            time.sleep(0.2)
        yield found
decode_worker.read_frames = read_frames
main(""",
    1,
)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_process, "_BOOT", FRAGILE)


def clip(
    spool: Spool, data: bytes, size: tuple[int, int] = (28, 56), views: tuple[View, ...] = ()
) -> PlacedImage:
    """The video in the spool, as preparing leaves it."""
    digest, path, offset, num_bytes = spool.add("shard", data)
    layout = ImageLayout(*size, (2, 2, 4), 4, views, Clip(FRAMES, 10.0, 2.0))
    return PlacedImage(EncodedImage(digest, 64, 48, path, offset, num_bytes), layout, 0)


def feed(feeder: Feeder, items: list[Group]) -> list[tuple[object, ...]]:
    found = []
    running = feeder.feed(items)
    while (fed := running.get(30.0)) is not END:
        assert isinstance(fed, Fed)
        found.append(tuple(i.copy() if isinstance(i, np.ndarray) else i for i in fed.images))
        fed.release()
    running.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", [False, True])
def test_frames_come_in_the_layouts_size(spool: Spool, workers: int, resize: bool) -> None:
    data = video(12, 10)
    items = [group(0, clip(spool, data)), group(1, placed(spool, jpeg()), clip(spool, data))]
    with Feeder(workers, BYTES, PIXELS, resize=resize) as feeder:
        (one,), (picture, two) = feed(feeder, items)
    frames = dict(read_frames(data, FRAMES, Limits(PIXELS, 99.0, 9.0)))
    expected = [
        np.asarray(Image.fromarray(frames[n]).resize((56, 28), Image.Resampling.BICUBIC))
        for n in FRAMES
    ]
    assert np.array_equal(one, np.stack(expected))
    assert np.array_equal(two, one)
    assert picture.shape == ((28, 56, 3) if resize else (48, 64, 3))


def test_plain_views_are_made_by_the_worker(spool: Spool) -> None:
    data = video(12, 10)
    views = (View(10, 14, (10, 14)), View(96, 64, (96, 64), filter="lanczos"))
    with Feeder(1, BYTES, PIXELS, resize=False) as feeder:
        ((packed,),) = feed(feeder, [group(0, clip(spool, data, views=views))])
    assert packed.shape == (4, 10 * 14 + 96 * 64, 3)
    frames = dict(read_frames(data, FRAMES, Limits(PIXELS, 99.0, 9.0)))
    for number, made in zip(FRAMES, packed, strict=True):
        picture = Image.fromarray(frames[number])
        small = np.asarray(picture.resize((14, 10), Image.Resampling.BICUBIC))
        large = np.asarray(picture.resize((64, 96), Image.Resampling.LANCZOS))
        assert np.array_equal(made[:140].reshape(10, 14, 3), small)
        assert np.array_equal(made[140:].reshape(96, 64, 3), large)


def test_other_views_get_the_frames_as_they_are(spool: Spool) -> None:
    views = (View(10, 10, (10, 10), box=(0, 0, 9, 9)),)
    items = [group(0, clip(spool, video(12, 10), views=views))]
    with Feeder(1, BYTES, PIXELS, resize=True) as feeder:
        ((frames,),) = feed(feeder, items)
    assert frames.shape == (4, 48, 64, 3)
    assert [number_of(frame) for frame in frames] == list(FRAMES)


def test_a_video_larger_than_the_memory_is_served_alone(spool: Spool) -> None:
    items = [group(n, clip(spool, video(12, 10), size=(280, 280))) for n in range(3)]
    with Feeder(2, 100_000, PIXELS, resize=True) as feeder:
        assert [frames.shape for (frames,) in feed(feeder, items)] == [(4, 280, 280, 3)] * 3


def test_a_worker_killed_at_a_video_loses_no_row(
    spool: Spool, fragile: None, tmp_path: Path
) -> None:
    data = video(12, 10)
    marks = [b"once:" + str(tmp_path / f"{n}").encode() for n in range(3)]
    items = [group(n, clip(spool, data + mark)) for n, mark in enumerate([*marks, b"", b""])]
    with Feeder(2, BYTES, PIXELS, resize=True) as feeder:
        found = feed(feeder, items)
        assert feeder.stats()["replaced_workers"] == 3
    assert len(found) == 5
    assert all(np.array_equal(frames, found[-1][0]) for (frames,) in found)


def test_a_deadly_video_fails_alone(spool: Spool, fragile: None) -> None:
    marks = [b"", b"deadly", b""]
    items = [group(n, clip(spool, video(12, 10) + mark)) for n, mark in enumerate(marks)]
    with Feeder(1, BYTES, PIXELS, resize=True) as feeder:
        (good,), (bad,), (last,) = feed(feeder, items)
    assert isinstance(bad, RowError)
    assert bad.code == "worker_crash"
    assert np.array_equal(good, last)


def test_a_stuck_decoder_is_killed(
    spool: Spool, fragile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "TASK_TIMEOUT_SEC", 1.5)
    items = [group(0, clip(spool, video(12, 10) + b"stuck")), group(1, clip(spool, video(12, 10)))]
    with Feeder(1, BYTES, PIXELS, resize=True) as feeder:
        (bad,), (good,) = feed(feeder, items)
    assert isinstance(bad, RowError)
    assert bad.code == "worker_crash"
    assert isinstance(good, np.ndarray)


def test_a_slow_video_fails_with_its_own_code(spool: Spool, fragile: None) -> None:
    items = [group(0, clip(spool, video(12, 10) + b"slow")), group(1, clip(spool, video(12, 10)))]
    with Feeder(1, BYTES, PIXELS, resize=True, video_timeout_sec=0.3) as feeder:
        (bad,), (good,) = feed(feeder, items)
    assert isinstance(bad, RowError)
    assert bad.code == "video_timeout"
    assert isinstance(good, np.ndarray)


def test_a_video_that_changes_its_size(spool: Spool) -> None:
    item = clip(spool, video(12, 10, width=96))
    with Feeder(1, BYTES, PIXELS, resize=True) as feeder:
        ((bad,),) = feed(feeder, [group(0, item)])
    assert isinstance(bad, RowError)
    assert bad.code == "video_unreadable"
