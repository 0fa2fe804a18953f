"""Frames of small videos of every kind: the right ones, the same whether sought or counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline import video as video_module
from pipeline.errors import RowError
from pipeline.media import load
from pipeline.rows import ImageRef
from pipeline.settings import InputSettings
from pipeline.video import Limits, probe, read_frames
from tests.helpers.videos import number_of, sound_only, video

LIMITS = Limits(10**8, 7200.0, 60.0)
SPARSE = (0, 3, 7, 8, 15, 16, 29)
VARYING = [0.1 * n + (0.5 if n > 10 else 0) for n in range(30)]
KINDS: dict[str, dict[str, Any]] = {
    "mp4 with H.264": {},
    "mp4 with B-frames": {"options": {"bf": "3"}, "gop": 12},
    "mp4 with MPEG-4": {"codec": "mpeg4"},
    "mp4 with H.265": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "mp4 with sound": {"sound": True},
    "mp4 of varying rate": {"times": VARYING},
    "mkv": {"kind": "mkv"},
    "avi": {"kind": "avi"},
    "webm with VP9": {"kind": "webm"},
    "webm with VP8's hidden frames": {
        "kind": "webm",
        "codec": "libvpx",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5"},
    },
    "gif": {"kind": "gif"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_asked_for(kind: str) -> None:
    options = KINDS[kind]
    if options.get("codec", "libx264") not in av.codecs_available:
        pytest.skip("this PyAV lacks the codec")
    data = video(30, 10, **options)
    info = probe(data, LIMITS)
    rate = 30 / 3.5 if "times" in options else 10
    assert (info.width, info.height, info.num_frames) == (64, 48, 30)
    assert info.fps == pytest.approx(rate, rel=0.01)
    whole = dict(read_frames(data, range(30), LIMITS))
    assert [number_of(frame) for frame in whole.values()] == list(range(30))
    for wanted in (SPARSE, (29,), (20, 2, 20)):
        found = list(read_frames(data, wanted, LIMITS))
        assert [number for number, _ in found] == sorted(set(wanted))
        assert all(np.array_equal(frame, whole[number]) for number, frame in found)


@pytest.mark.parametrize("kind", ["mp4 with H.264", "mp4 with MPEG-4", "avi", "webm with VP9"])
def test_pixels_are_those_of_transformers_reader(kind: str, tmp_path: Path) -> None:
    from transformers.video_utils import read_video_pyav

    data = video(30, 10, **KINDS[kind])
    path = tmp_path / "clip"
    path.write_bytes(data)
    theirs, _ = read_video_pyav(str(path), lambda metadata: np.array(SPARSE))
    ours = [frame for _, frame in read_frames(data, SPARSE, LIMITS)]
    assert np.array_equal(np.stack(ours), theirs)


def test_frames_far_apart_are_sought_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    plain = video_module._check_time
    monkeypatch.setattr(video_module, "_check_time", lambda end: (decoded.append(1), plain(end)))
    data = video(200, 25, gop=10)
    assert len(list(read_frames(data, (0, 100, 199), LIMITS))) == 3
    assert len(decoded) - 200 <= 25  # one for each packet of the index, then the frames


def test_counting_takes_over_where_times_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(30, 10)
    right = dict(read_frames(data, SPARSE, LIMITS))
    plain = video_module._read_index

    def shifted(*args: Any) -> Any:
        index = plain(*args)
        times = index.times
        return index._replace(times=[t + (1 if n >= 8 else 0) for n, t in enumerate(times)])

    monkeypatch.setattr(video_module, "_read_index", shifted)
    found = dict(read_frames(data, SPARSE, LIMITS))
    assert list(found) == list(SPARSE)
    assert all(np.array_equal(found[n], right[n]) for n in SPARSE)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(rotation: int) -> None:
    """A phone's upright clip says -90: its matrix turns the stored frames clockwise."""
    stored = dict(read_frames(video(3), (2,), LIMITS))[2]
    data = video(3, rotation=rotation)
    info = probe(data, LIMITS)
    shown = dict(read_frames(data, (2,), LIMITS))[2]
    assert np.array_equal(shown, np.rot90(stored, rotation // 90))
    assert (info.height, info.width) == shown.shape[:2]


def _cut_mkv() -> bytes:
    data = video(200, 10, kind="mkv", gop=20)
    return data[: len(data) // 2]


BROKEN: dict[str, tuple[bytes, str]] = {
    "noise": (bytes(range(256)) * 40, "not_a_video"),
    "a picture": (b"\xff\xd8\xff\xe0" + bytes(200), "not_a_video"),
    "text": (b"just text, no video" * 9, "not_a_video"),
    "a playlist": (b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not_a_video"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not_a_video"),
    "only sound": (sound_only(), "no_video_stream"),
    "half an mp4": (video(30)[:1500], "truncated_video"),
    "an mp4 without its end": (video(200, 10, faststart=True)[:-4000], "truncated_video"),
    "half an mkv": (_cut_mkv(), "truncated_video"),
    "half an avi": (video(30, kind="avi")[:4000], "truncated_video"),
    "most of a gif": ((lambda d: d[: len(d) * 9 // 10])(video(30, kind="gif")), "truncated_video"),
    "a head alone": (b"\x1a\x45\xdf\xa3" + bytes(300), "video_unreadable"),
    "garbled frames": (
        (lambda d: d[:600] + bytes(len(d) - 1200) + d[-600:])(video(60, gop=60)),
        "video_unreadable",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_videos_have_a_code(name: str) -> None:
    data, code = BROKEN[name]
    with pytest.raises(RowError) as caught:
        info = probe(data, LIMITS)
        list(read_frames(data, range(info.num_frames), LIMITS))
    assert caught.value.code == code


def test_a_gif_may_lack_its_trailer_and_have_bytes_after_it() -> None:
    data = video(9, width=63, height=47, kind="gif")
    for given in (data, data[:-1], data + b"and more"):
        assert probe(given, LIMITS).num_frames == 9


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (LIMITS._replace(max_pixels=64 * 48 - 1), "video_too_large"),
        (LIMITS._replace(max_sec=2.9), "video_too_long"),
        (LIMITS._replace(timeout_sec=-1.0), "video_timeout"),
    ],
)
def test_limits(limits: Limits, code: str) -> None:
    with pytest.raises(RowError) as caught:
        probe(video(30, 10), limits)
    assert caught.value.code == code


def test_a_video_has_a_number_of_frames_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_module, "MAX_FRAMES", 29)
    with pytest.raises(RowError) as caught:
        probe(video(30, 10), LIMITS)
    assert caught.value.code == "too_many_frames"


def test_frames_beyond_the_end() -> None:
    with pytest.raises(RowError) as caught:
        list(read_frames(video(10), (3, 10), LIMITS))
    assert caught.value.code == "truncated_video"


def test_still_pictures_of_sound_files_are_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(frame.reformat(format="yuvj420p")))
    with pytest.raises(RowError) as caught:
        probe(file.getvalue(), LIMITS)
    assert caught.value.code == "no_video_stream"


@pytest.mark.parametrize(
    ("ref", "settings", "code"),
    [
        (ImageRef(data=b"", kind="video"), {}, "empty_video"),
        (ImageRef(path="", kind="video"), {}, "missing_video"),
        (ImageRef(path="/nowhere/x.mp4", kind="video"), {}, "missing_file"),
        (ImageRef(path="/dev/zero", kind="video"), {}, "missing_file"),
        (ImageRef(path="https://example.org/x.mp4", kind="video"), {}, "remote_disabled"),
        (ImageRef(path="http://127.0.0.1/x", kind="video"), {"remote": True}, "remote_forbidden"),
        (ImageRef(data=b"x" * 11, kind="video"), {"max_video_bytes": 10}, "file_too_large"),
        (ImageRef(path="data:video/mp4;base64,??", kind="video"), {}, "video_unreadable"),
    ],
)  # fmt: skip
def test_loading(ref: ImageRef, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(RowError) as caught:
        load(ref, InputSettings(path="x", **settings))
    assert caught.value.code == code


def test_a_video_may_be_larger_than_an_image() -> None:
    settings = InputSettings(path="x", max_bytes=10, max_video_bytes=20)
    assert load(ImageRef(data=b"x" * 15, kind="video"), settings) == b"x" * 15


SHAPES: dict[str, dict[str, Any]] = {
    "pyramid": {"options": {"bf": "5", "b-pyramid": "normal", "b_strategy": "0"}, "gop": 24},
    "no B-frames": {"options": {"bf": "0"}, "gop": 16},
    "open groups": {"options": {"bf": "3", "x264-params": "open-gop=1"}, "gop": 9},
    "MPEG-4 with B-frames": {"codec": "mpeg4", "options": {"bf": "2"}, "gop": 12},
    "H.265": {"codec": "libx265", "options": {"x265-params": "log-level=none"}, "gop": 20},
    "VP9": {"kind": "webm"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_choice_of_frames_is_the_whole_videos(shape: str) -> None:
    """Frames that no other needs are left out on the way, and groups are skipped."""
    options = SHAPES[shape]
    if options.get("codec", "libx264") not in av.codecs_available:
        pytest.skip("this PyAV lacks the codec")
    data = video(70, 10, **options)
    whole = dict(read_frames(data, range(70), LIMITS))
    rng = np.random.default_rng(0)
    for _ in range(12):
        wanted = rng.choice(70, rng.integers(1, 9), replace=False)
        found = list(read_frames(data, wanted.tolist(), LIMITS))
        assert [number for number, _ in found] == sorted(wanted.tolist())
        assert all(np.array_equal(frame, whole[number]) for number, frame in found)


def _growing() -> bytes:
    """A bare H.264 stream whose frames grow in the middle."""
    parts = []
    for side in (64, 512):
        file = io.BytesIO()
        with av.open(file, "w", format="h264") as container:
            stream: Any = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            stream.options = {"threads": "1"}
            for number in range(5):
                array = np.full((side, side, 3), 40 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode(None))
        parts.append(file.getvalue())
    return b"".join(parts)


def test_frames_that_grow_beyond_the_limit() -> None:
    data = _growing()
    sizes = [frame.shape for _, frame in read_frames(data, range(10), LIMITS)]
    assert sizes == [(64, 64, 3)] * 5 + [(512, 512, 3)] * 5
    limits = LIMITS._replace(max_pixels=100 * 100)
    with pytest.raises(RowError) as caught:
        list(read_frames(data, range(10), limits))
    assert caught.value.code == "video_unreadable"
