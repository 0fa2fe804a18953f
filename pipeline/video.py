"""Video containers through PyAV: what is in them, and chosen frames as RGB pixels.

A video is a stranger's and the decoders are native code, so `probe` runs in `video_probe`'s process
and `read_frames` in the feeder's workers, never where rows are prepared. Frames are numbered as
they are shown. Knows no model and no row. Imports no torch.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RowError
from pipeline.rows import VideoInfo

MAX_FRAMES = 1_000_000
# Playlists (hls, concat, dash) are not among these: they would let a row open files and URLs.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,flv,asf,mpegts,mpeg,ogg,ivf,h264,hevc"
_SEEKABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})  # their key frames are true
_MICROSECOND = Fraction(1, 1_000_000)
_MAX_FPS = 1000
_DEFAULT_FPS = 24.0  # of a video without any time, as the Qwen3-VL processor assumes
_TROUBLE = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)
_SHORTER = 0.9  # of the length that the container names, below which its end is missing


class Limits(NamedTuple):
    """What a video may be at most."""

    max_pixels: int
    max_sec: float
    timeout_sec: float


class _Index(NamedTuple):
    """The frames of a stream by their packets, nothing decoded."""

    times: list[int]  # when frames are shown, ascending; empty where not every frame says so
    keys: list[int]  # of these, where decoding may begin
    num_frames: int
    span: Fraction  # seconds from the first frame's beginning to the last one's end
    end: Fraction  # seconds at which the last packet of all streams ends


def probe(data: bytes, limits: Limits) -> VideoInfo:
    """Size, frames and rate, from the packets and the first frame. Raises: RowError."""
    deadline = time.monotonic() + limits.timeout_sec
    with _opened(data, limits) as (container, stream):
        context = stream.codec_context
        _check_pixels(context.width, context.height, limits)
        index = _read_index(container, stream, limits, deadline)
        _check_length(container, index)
        if data[:4] == b"GIF8" and _is_cut(data):  # decoders make the last frame up
            raise RowError("truncated_video")
        fps = _rate(stream, index)
        if index.times:
            _rewind(container, stream, index)
            return VideoInfo(*_shown_size(container, stream, limits), index.num_frames, fps)
    with _opened(data, limits) as (container, stream):
        return VideoInfo(*_shown_size(container, stream, limits), index.num_frames, fps)


def read_frames(
    data: bytes, wanted: Sequence[int], limits: Limits
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, uint8 RGB [height, width, 3]) of the wanted frames, ascending, each once."""
    deadline = time.monotonic() + limits.timeout_sec
    numbers = sorted(set(wanted))
    found = 0
    with _opened(data, limits) as (container, stream):
        index = _read_index(container, stream, limits, deadline)
        if index.times:
            _rewind(container, stream, index)
            for number, frame in _sought(container, stream, index, numbers, deadline):
                yield number, _pixels(frame, limits)
                found += 1
    if found < len(numbers):  # the decoder's times are not the packets': count instead
        with _opened(data, limits) as (container, stream):
            for number, frame in _counted(container, stream, numbers[found:], deadline):
                yield number, _pixels(frame, limits)


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of moving pictures; PyAV's errors become RowErrors."""
    import av
    from av.stream import Disposition

    av.logging.set_level(None)
    known = _has_mark(data)
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        with av.open(io.BytesIO(data), options=options) as container:
            known = True
            pictures = [
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic
            ]
            if not pictures:
                raise RowError("no_video_stream")
            stream = pictures[0]
            if stream.codec_context is None:
                raise RowError("video_unreadable", "The video's codec is not supported.")
            stream.codec_context.thread_count = 1  # the cores decode other videos meanwhile
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
            yield container, stream
    except MemoryError:
        raise RowError("video_too_large", "The video does not fit the memory.") from None
    except (av.error.FFmpegError, *_TROUBLE) as error:
        raise _explained(data, error, known) from None


def _explained(data: bytes, error: Exception, known: bool) -> RowError:
    if _is_cut(data):
        return RowError("truncated_video")
    if not known:
        return RowError("not_a_video")
    reason = getattr(error, "strerror", None) or error
    return RowError("video_unreadable", f"The video cannot be decoded: {reason}.")


def _has_mark(data: bytes) -> bool:
    """Whether the bytes begin as one of the usual containers."""
    riff = data[:4] == b"RIFF" and data[8:12] == b"AVI "
    starts = (b"\x1a\x45\xdf\xa3", b"FLV", b"GIF8", b"OggS", b"\x30\x26\xb2\x75", b"DKIF")
    return riff or data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") or data.startswith(starts)


def _is_cut(data: bytes) -> bool:
    """Whether an MP4's last box or a GIF's last block reaches beyond the bytes, or an AVI is
    shorter than it says.
    """
    if data[:4] == b"GIF8":
        return _gif_end(data) > len(data)
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[4:8] != b"ftyp":
        return False
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size == 0:  # to the end
            return False
        place += max(8, size)
    return place != len(data)


def _gif_end(data: bytes) -> int:
    """Where a GIF's blocks end, or the first that is none begins; a trailer may be missing."""
    place = 13 + _gif_colours(data[10:11])
    while data[place : place + 1] in (b"!", b","):
        if data[place] == ord("!"):
            place += 2
        else:
            place += 11 + _gif_colours(data[place + 9 : place + 10])
        while place < len(data) and data[place]:
            place += data[place] + 1
        place += 1  # the empty block that ends them
    return place


def _gif_colours(flags: bytes) -> int:
    """Bytes of the palette that the flags tell of."""
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0


def _read_index(container: Any, stream: Any, limits: Limits, deadline: float) -> _Index:
    """Walk all packets; the pictures' own say how many frames there are and when."""
    times: list[int | None] = []
    keys: list[int] = []
    last = end = Fraction(0)
    for packet in container.demux():
        if not packet.size or packet.time_base is None:
            continue
        stop = (packet.pts or 0) + (packet.duration or 0)
        end = max(end, stop * Fraction(packet.time_base))
        if packet.stream_index != stream.index or packet.is_discard or not _is_shown(packet):
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        last = max(last, stop * Fraction(packet.time_base))
        _check_extent(len(times), last, limits)
        _check_time(deadline)
    known = sorted(time for time in times if time is not None)
    first = known[0] * Fraction(stream.time_base) if known else Fraction(0)
    whole = len(set(known)) == len(times) and container.format.name in _SEEKABLE
    return _Index(known if whole else [], sorted(keys), len(times), last - first, end)


def _is_shown(packet: Any) -> bool:
    """False for VP8's hidden reference frames, which are packets of their own."""
    return packet.stream.codec_context.name != "vp8" or bool(bytes(packet)[0] >> 4 & 1)


def _check_extent(num_frames: int, seconds: Fraction, limits: Limits) -> None:
    if num_frames > MAX_FRAMES:
        raise RowError("too_many_frames", f"The video has more than {MAX_FRAMES} frames.")
    if seconds > limits.max_sec:
        raise RowError("video_too_long", f"The video lasts more than {limits.max_sec:g} seconds.")


def _check_length(container: Any, index: _Index) -> None:
    """The frames that are there must be about as many as the container says."""
    if not index.num_frames:
        raise RowError("empty_video", "The video has no frames.")
    named = Fraction(container.duration or 0) * _MICROSECOND
    if index.times and float(index.end) < _SHORTER * float(named) - 0.1:
        message = f"The video names {float(named):.1f} seconds and ends after"
        raise RowError("truncated_video", f"{message} {float(index.end):.1f}.")


def _rate(stream: Any, index: _Index) -> float:
    """Frames a second as the container says, or as the frames' times do where it lies."""
    named = float(stream.average_rate or 0)
    measured = float(index.num_frames / index.span) if index.span > 0 and index.times else 0.0
    if measured and not 0.5 < named / measured < 2:
        named = measured
    named = named or float(stream.guessed_rate or 0)
    return named if 0 < named <= _MAX_FPS else measured or _DEFAULT_FPS


def _rewind(container: Any, stream: Any, index: _Index) -> None:
    """Back to the first frame. Opening anew would decode some frames to guess at the stream."""
    container.seek((index.keys or index.times)[0], stream=stream, backward=True)


def _shown_size(container: Any, stream: Any, limits: Limits) -> tuple[int, int]:
    """Width and height of the next frame as it is shown."""
    for frame in container.decode(stream):
        _check_pixels(frame.width, frame.height, limits)
        turned = frame.rotation % 180 == 90
        return (frame.height, frame.width) if turned else (frame.width, frame.height)
    raise RowError("video_unreadable", "The video's first frame cannot be decoded.")


def _sought(
    container: Any, stream: Any, index: _Index, numbers: Sequence[int], deadline: float
) -> Iterator[tuple[int, Any]]:
    """Frames by their times, from the key frame before each; ends where one is not found."""
    wanted = {index.times[number] for number in numbers if number < index.num_frames}
    frames = _decoded(container, stream, wanted)
    position = index.times[0] - 1
    for number in numbers:
        if number >= index.num_frames:
            return
        target = index.times[number]
        before = bisect_right(index.keys, target)
        if before > 1 and index.keys[before - 1] > position + 1:
            container.seek(index.keys[before - 1], stream=stream, backward=True)
            frames = _decoded(container, stream, wanted)
        for frame in frames:
            _check_time(deadline)
            position = frame.pts if frame.pts is not None else position
            if frame.pts is None or position >= target:
                break
        else:
            return
        if frame.pts != target:
            return
        yield number, frame


def _decoded(container: Any, stream: Any, wanted: Collection[int]) -> Iterator[Any]:
    """Frames from here on; those that are not wanted and that no other needs may be left out."""
    for packet in container.demux(stream):
        keep = not packet.size or packet.pts in wanted
        stream.codec_context.skip_frame = "DEFAULT" if keep else "NONREF"
        yield from packet.decode()


def _counted(
    container: Any, stream: Any, numbers: Sequence[int], deadline: float
) -> Iterator[tuple[int, Any]]:
    """Frames by their numbers, everything before them decoded."""
    wanted = iter(numbers)
    number = next(wanted)
    for count, frame in enumerate(container.decode(stream)):
        _check_time(deadline)
        if count == number:
            yield number, frame
            found = next(wanted, None)
            if found is None:
                return
            number = found
    raise RowError("truncated_video", f"The video ends before its frame {number}.")


def _pixels(frame: Any, limits: Limits) -> np.ndarray:
    _check_pixels(frame.width, frame.height, limits)
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4
    return np.rot90(pixels, quarters) if quarters else pixels


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        message = f"The video's frames are {width} x {height}, more than {limits.max_pixels}"
        raise RowError("video_too_large", f"{message} pixels.")


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RowError("video_timeout")
