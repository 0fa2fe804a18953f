"""The process that measures videos: its answers, its death, its patience."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import helper_process, video_probe
from pipeline.errors import RowError
from pipeline.rows import VideoInfo
from pipeline.settings import InputSettings
from pipeline.video_probe import VideoProber
from tests.helpers.videos import video

FRAGILE = helper_process._BOOT.replace(
    "main(",
    """
import os, time
from pipeline import video_probe
plain = video_probe.probe
def probe(data, limits):
    if data.endswith(b"deadly"):
        os.kill(os.getpid(), 9)
    if data.endswith(b"stuck"):
        time.sleep(1000)
    if data.endswith(b"huge"):
        bytearray(1 << 40)
    return plain(data, limits)
video_probe.probe = probe
main(""",
    1,
)


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Iterator[VideoProber]:
    monkeypatch.setattr(helper_process, "_BOOT", FRAGILE)
    monkeypatch.setattr(video_probe, "_GRACE_SEC", 0.2)
    made = VideoProber(InputSettings(path="x", video_timeout_sec=1.0))
    yield made
    made.close()


def _code(prober: VideoProber, data: bytes) -> str:
    with pytest.raises(RowError) as caught:
        prober.probe(data)
    return caught.value.code


def test_answers_and_errors_come_from_one_process(prober: VideoProber) -> None:
    assert prober.probe(video(12, 6)) == VideoInfo(64, 48, 12, 6.0)
    assert prober._process is not None
    pid = prober._process.pid
    assert _code(prober, b"no video" * 50) == "not_a_video"
    assert prober.probe(video(5, 5, 80, 32)) == VideoInfo(80, 32, 5, 5.0)
    assert prober._process.pid == pid


@pytest.mark.parametrize(
    ("mark", "code"),
    [(b"deadly", "worker_crash"), (b"stuck", "video_timeout"), (b"huge", "video_too_large")],
)
def test_a_video_that_harms_the_process_fails_alone(
    prober: VideoProber, mark: bytes, code: str
) -> None:
    data = video(6, 6)
    start = time.monotonic()
    assert _code(prober, data + mark) == code
    assert time.monotonic() - start < 10
    assert prober.probe(data).num_frames == 6


def test_the_process_may_be_killed_between_two_videos(prober: VideoProber) -> None:
    data = video(6, 6)
    prober.probe(data)
    assert prober._process is not None
    os.kill(prober._process.pid, signal.SIGKILL)
    prober._process.wait()
    assert prober.probe(video(7, 6)).num_frames == 7


def test_a_video_is_measured_once(prober: VideoProber, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = video(6, 6), video(7, 6)
    info = prober.probe(data)
    monkeypatch.setattr(prober, "_answer", lambda _: (None, (1, 2, 3, 4.0)))
    assert prober.probe(data) is info
    assert prober.probe(other) == VideoInfo(1, 2, 3, 4.0)
    monkeypatch.setattr(video_probe, "KEPT", 1)
    prober.probe(video(8, 6))
    assert len(prober._known) <= 2


_HOLDER = """
import sys
from pipeline.settings import InputSettings
from pipeline.video_probe import VideoProber
from tests.helpers.videos import video
prober = VideoProber(InputSettings(path="x"))
prober.probe(video(3, 3))
print(prober._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_process_ends_with_its_killed_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def test_nothing_is_started_without_a_video() -> None:
    prober = VideoProber(InputSettings(path="x"))
    assert prober._process is None
    prober.close()
