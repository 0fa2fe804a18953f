"""Small videos made by PyAV, each frame telling its own number, for tests only.

A frame shows its number as bars, which a lossy codec leaves readable.
"""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 8
CODECS = {"mp4": "libx264", "avi": "mpeg4", "mkv": "libx264", "webm": "libvpx-vp9", "gif": "gif"}


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]: the number's bits as light and dark bars above a coloured ramp."""
    bits = number >> np.arange(BITS)[::-1] & 1
    bars = np.repeat(40 + 160 * bits, width // BITS)
    row = np.pad(bars, (0, width - len(bars)), mode="edge")[None, :, None]
    above = np.broadcast_to(row, (height // 2, width, 3))
    ramp = np.linspace(40, 220, width)[None, :, None] * np.array([1.0, 0.7, 0.4])
    below = np.broadcast_to(ramp, (height - height // 2, width, 3))
    return np.concatenate([above, below]).astype(np.uint8)


def video(
    num_frames: int = 30,
    fps: float = 10,
    width: int = 64,
    height: int = 48,
    kind: str = "mp4",
    *,
    codec: str | None = None,
    rotation: int = 0,
    times: list[float] | None = None,
    options: dict[str, str] | None = None,
    sound: bool = False,
    gop: int = 8,
    faststart: bool = False,
) -> bytes:
    """An encoded video; `times` are the frames' seconds where the rate varies.

    `faststart` puts an MP4's index before its frames.
    """
    path = tempfile.mktemp(f".{kind}")
    rate = Fraction(fps).limit_denominator(1001)
    form = {"mkv": "matroska"}.get(kind, kind)
    flags = {"movflags": "faststart"} if faststart else {}
    with av.open(path, "w", format=form, options=flags) as container:
        stream: Any = container.add_stream(codec or CODECS[kind], rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        stream.options = {"g": str(gop), "threads": "1", **(options or {})}
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            voice: Any = container.add_stream("aac", rate=16000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            _add_silence(container, voice, num_frames / fps)
    data = Path(path).read_bytes()
    Path(path).unlink()
    return data


def sound_only(seconds: float = 1.0) -> bytes:
    """An MP4 without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        _add_silence(container, container.add_stream("aac", rate=16000), seconds)
    return file.getvalue()


def _add_silence(container: Any, stream: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def number_of(frame: np.ndarray) -> int:
    """The number that a decoded frame shows."""
    height, width = frame.shape[:2]
    part = width // BITS
    middles = frame[height // 8 : height * 3 // 8, part // 2 : part * BITS : part].mean((0, 2))
    return int((middles > 120) @ (1 << np.arange(BITS)[::-1]))
