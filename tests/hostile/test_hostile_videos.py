"""Videos made to harm: containers that lie, and two hundred with random bytes changed.

Each ends with an answer or a documented code, in time, and in the same helper process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.errors import CODES, RowError
from pipeline.feeder import END, Feeder
from pipeline.rows import Clip, EncodedImage, ImageLayout, PlacedImage, VideoInfo
from pipeline.settings import InputSettings
from pipeline.spool import Spool
from pipeline.video_probe import VideoProber
from tests.feeder.feed_items import group
from tests.helpers.videos import video

GOOD = video(30, 10)
VIDEO_CODES = {code for code in CODES if "video" in code or "frames" in code}
SEEDS = 200
PATIENCE_SEC = 10.0


@pytest.fixture(scope="module")
def prober() -> Iterator[VideoProber]:
    made = VideoProber(InputSettings(path="x", video_timeout_sec=PATIENCE_SEC))
    yield made
    made.close()


def _patched(box: bytes, *changes: tuple[int, int], size: int = 4) -> bytes:
    """The good MP4 with numbers changed at offsets behind a box's name."""
    data = bytearray(GOOD)
    start = GOOD.index(box) + len(box)
    for offset, value in changes:
        data[start + offset : start + offset + size] = value.to_bytes(size, "big")
    return bytes(data)


LIES: dict[str, tuple[bytes, set[str | None]]] = {
    "four thousand million samples": (
        _patched(b"stsz", (4, 1), (8, 0xFFFFFFF0)),
        {"empty_video", "video_unreadable"},
    ),
    "two thousand million sizes": (_patched(b"stsz", (8, 0x7FFFFFFF)), {"video_unreadable"}),
    "more sizes than there are": (
        _patched(b"stsz", (8, 100)),
        {"empty_video", "truncated_video", "video_unreadable"},
    ),
    "a frame of months": (_patched(b"stts", (12, 0xFFFFFFF)), {"video_too_long"}),
    "frames without time": (_patched(b"stts", (12, 0)), {None, "video_unreadable"}),
    "a clock that stands": (_patched(b"mdhd", (12, 0)), {None, "video_unreadable"}),
    "a size that the codec denies": (_patched(b"avc1", (24, 60000), (26, 60000), size=2), {None}),
    "an edit of ages": (_patched(b"elst", (8, 0x7FFFFFFF)), {None, "truncated_video"}),
    "days between two frames": (
        video(4, 10, kind="mkv", times=[0.0, 0.1, 90_000.0, 90_000.1]),
        {"video_too_long"},
    ),
}


def _outcome(prober: VideoProber, data: bytes) -> VideoInfo | str:
    start = time.monotonic()
    try:
        return prober.probe(data)
    except RowError as error:
        return error.code
    finally:
        assert time.monotonic() - start < PATIENCE_SEC + 5


@pytest.mark.parametrize("name", LIES)
def test_containers_that_lie(prober: VideoProber, name: str) -> None:
    data, expected = LIES[name]
    found = _outcome(prober, data)
    assert (None if isinstance(found, VideoInfo) else found) in expected
    if isinstance(found, VideoInfo):
        assert (found.width, found.height) == (64, 48)
        assert 0 < found.num_frames <= 30
        assert found.fps > 0


def _mutated(seed: int, kinds: list[bytes]) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(kinds[seed % len(kinds)])
    for place in rng.integers(0, len(data), rng.integers(1, 40)):
        data[place] = rng.integers(0, 256)
    return bytes(data)


def test_random_damage_is_a_failed_row_and_never_a_dead_process(
    prober: VideoProber,
) -> None:
    kinds = [GOOD, *(video(20, 10, kind=kind) for kind in ("mkv", "webm", "avi", "gif"))]
    prober.probe(GOOD)
    assert prober._process is not None
    pid = prober._process.pid
    readable = []
    for seed in range(SEEDS):
        data = _mutated(seed, kinds)
        found = _outcome(prober, data)
        if isinstance(found, VideoInfo):
            readable.append((data, found))
        else:
            assert found in VIDEO_CODES - {"worker_crash", "video_timeout"}
    assert prober._process.pid == pid
    assert len(readable) > SEEDS // 5
    _feed(readable)


def _feed(readable: list[tuple[bytes, VideoInfo]]) -> None:
    """All frames of those that could be measured, through one worker that must live."""
    with Spool() as spool, Feeder(1, 64 << 20, 10**7, resize=True) as feeder:
        items = []
        for number, (data, info) in enumerate(readable):
            digest, path, offset, num_bytes = spool.add("shard", data)
            clip = Clip(tuple(range(info.num_frames)), info.fps, info.fps)
            layout = ImageLayout(28, 56, (1, 2, 4), 2, clip=clip)
            image = EncodedImage(digest, info.width, info.height, path, offset, num_bytes)
            items.append(group(number, PlacedImage(image, layout, 0)))
        feed, count = feeder.feed(items), 0
        while (fed := feed.get(30.0)) is not END:
            assert fed is not None
            (frames,) = fed.images
            assert isinstance(frames, np.ndarray) or frames.code in VIDEO_CODES
            fed.release()
            count += 1
        assert count == len(readable)
        assert feeder.stats()["replaced_workers"] == 0
