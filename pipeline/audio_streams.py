"""Recordings whose length no header tells for sure, through PyAV: MP3, AAC, M4A, WebM and such.

They are decoded to be measured, and once more to be heard. Knows no model and no row. Imports no
torch.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RowError

# Playlists are not among these: they would let a row open files and URLs.
FORMATS = "mp3,aac,flac,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
_LOST_SHARE = 0.01  # of packets that may be damaged, such as tags between or after them
_SHORTER = 0.9  # of the length that the file names, below which its end is missing
_FULL = {"u8": 1 << 7, "s16": 1 << 15, "s32": 1 << 31, "flt": 1, "dbl": 1}  # of sample formats


class Block(NamedTuple):
    """Some samples: the mean of the channels."""

    samples: np.ndarray  # float32
    rate: int


def blocks(data: bytes) -> Iterator[Block]:
    """The recording in its order. Raises: RowError where it is none, or much of it is damaged."""
    num_packets = num_lost = num_samples = 0
    rate = 0
    with _opened(data) as (container, stream):
        for packet in container.demux(stream):
            num_packets += 1
            for frame in _frames(packet):
                if frame is None:
                    num_lost += 1
                    continue
                if rate not in (0, frame.sample_rate):
                    raise RowError("corrupt_audio", "The recording changes its sample rate.")
                rate = frame.sample_rate
                num_samples += frame.samples
                yield Block(_mono(frame), rate)
        named = float(container.duration or 0) / 1e6
    if num_lost > max(2, _LOST_SHARE * num_packets):
        raise RowError("corrupt_audio", f"{num_lost} of {num_packets} packets are damaged.")
    if rate and _is_named(data) and num_samples / rate < _SHORTER * named - 0.1:
        message = f"The recording ends after {num_samples / rate:.1f} of {named:.1f} s."
        raise RowError("truncated_audio", message)


def _frames(packet: Any) -> Iterator[Any]:
    """The packet's frames; None for one that cannot be decoded."""
    from av.error import InvalidDataError

    try:
        yield from packet.decode()
    except InvalidDataError:
        yield None


def _mono(frame: Any) -> np.ndarray:
    kind = frame.format.name.removesuffix("p")
    if kind not in _FULL:
        raise RowError("corrupt_audio", f"Samples of the format {kind} are not read.")
    values: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:  # [1, samples * channels]
        values = values.reshape(-1, len(frame.layout.channels)).T
    values = values.astype(np.float32)
    if kind == "u8":
        values -= 128
    mean: np.ndarray = values.mean(0) / np.float32(_FULL[kind])
    return mean


def _is_named(data: bytes) -> bool:
    """Whether the file says its length; an MP3 without a tag is judged by its size alone."""
    if data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3"):
        return True
    head = data[: 1 << 16]
    return b"Xing" in head or b"Info" in head


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of sound; PyAV's errors become RowErrors."""
    import av

    av.logging.set_level(None)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            if not container.streams.audio:
                raise RowError("not_audio", "The file has no sound.")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise RowError("corrupt_audio", "The recording's codec is not supported.")
            stream.codec_context.thread_count = 1  # the cores decode others meanwhile
            yield container, stream
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, av.error.FFmpegError) and not _is_known(data):
            raise RowError("not_audio") from None
        raise RowError("corrupt_audio", f"The recording cannot be decoded: {error}.") from None


def _is_known(data: bytes) -> bool:
    """Whether the bytes begin as one of the formats."""
    frame = len(data) > 1 and data[0] == 0xFF and data[1] >= 0xE0
    return frame or data[4:8] == b"ftyp" or data.startswith((b"ID3", b"\x1aE\xdf\xa3"))
