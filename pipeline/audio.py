"""Recordings: how long they are, and their samples as models hear them.

That is mono float32 at 16 kHz, mixed and resampled as librosa does by default. Formats whose header
tells their length are read by libsndfile, the others by `audio_streams`. A recording is a
stranger's and the decoders are native code, so `probe` runs in `video_probe`'s process and
`read_samples` in the feeder's workers. Knows no model and no row. Imports no torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline import audio_streams
from pipeline.errors import RowError

RATE = 16_000
FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "AIFF"})
_BLOCK_VALUES = 1 << 20  # decoded at once, over all channels
_SPARE_SEC = 0.1  # by which the end may miss what the header says
_STARTS = (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM")  # of what libsndfile reads
_OGG_HEAD = 27  # bytes of a page's head, the last of them the number of segments
_MIN_RATE, _MAX_RATE = 1_000, 768_000


def probe(data: bytes, max_sec: float) -> int:
    """Samples that `read_samples` will give. Raises: RowError."""
    if not data.startswith(_STARTS):
        return _probe_stream(data, max_sec)
    with _opened(data) as file:
        if _is_cut(data):
            raise RowError("truncated_audio")
        _check_length(file.frames, file.samplerate, max_sec)
        return _resampled_length(file.frames, file.samplerate)


def _probe_stream(data: bytes, max_sec: float) -> int:
    frames, rate = 0, RATE
    for block in audio_streams.blocks(data):
        frames, rate = frames + len(block.samples), block.rate
        _check_rate(rate)
        _check_length(frames, rate, max_sec)
    _check_length(frames, rate, max_sec)
    return _resampled_length(frames, rate)


def _check_length(frames: int, rate: int, max_sec: float) -> None:
    if frames <= 0:
        raise RowError("empty_audio", "The recording has no samples.")
    if frames > max_sec * rate:
        raise RowError("audio_too_long", f"The recording lasts more than {max_sec:g} seconds.")


def _check_rate(rate: int) -> None:
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise RowError("corrupt_audio", f"{rate} samples a second are none.")


def read_samples(data: bytes, num_samples: int) -> np.ndarray:
    """float32 [num_samples], which is what `probe` has told. Raises: RowError."""
    mono, rate = _read(data) if data.startswith(_STARTS) else _read_stream(data, num_samples)
    if not np.isfinite(mono).all():
        raise RowError("corrupt_audio", "The recording has samples that are no numbers.")
    if rate != RATE:
        mono = _resampled(mono, rate)
    # What `probe` has promised: a few samples of silence, or less, make up the difference.
    out = np.zeros(num_samples, np.float32)
    out[: len(mono)] = mono[:num_samples]
    return out


def _read(data: bytes) -> tuple[np.ndarray, int]:
    with _opened(data) as file:
        rate, expected = file.samplerate, file.frames
        mono = _mono(file)
    if len(mono) < expected - _SPARE_SEC * rate:
        message = f"The recording ends after {len(mono) / rate:.1f} of {expected / rate:.1f} s."
        raise RowError("truncated_audio", message)
    return mono, rate


def _read_stream(data: bytes, num_samples: int) -> tuple[np.ndarray, int]:
    parts, seconds, rate = [np.zeros(0, np.float32)], 0.0, RATE
    for block in audio_streams.blocks(data):
        parts.append(block.samples)
        rate = block.rate
        seconds += len(block.samples) / rate
        if seconds > num_samples / RATE + 1:
            raise RowError("corrupt_audio", "The recording is longer than it was.")
    return np.concatenate(parts), rate


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The file; libsndfile's errors become RowErrors."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                message = f"Recordings of the format {file.format} are not read."
                raise RowError("not_audio", message)
            _check_rate(file.samplerate)
            yield file
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        text = str(error)
        if "not recognised" in text or "unknown" in text.lower():
            raise RowError("not_audio") from None
        raise RowError("corrupt_audio", f"The recording cannot be decoded: {text}") from None


def _is_cut(data: bytes) -> bool:
    """Whether a WAV's or AIFF's frame names more bytes than there are; live streams name none.

    An Ogg names no length: it is cut where its last page is.
    """
    if data[:4] == b"OggS":
        return _ends_in_a_page(data)
    if data[:4] not in (b"RIFF", b"FORM"):
        return False
    named = int.from_bytes(data[4:8], "little" if data[:1] == b"R" else "big")
    return named < 0x7FFFFFFF and named + 8 > len(data) + 1


def _ends_in_a_page(data: bytes) -> bool:
    """Whether the bytes of an Ogg end before its last page does; tags after the pages are none."""
    place = 0
    while data[place : place + 4] == b"OggS":
        body = place + _OGG_HEAD
        if body > len(data):
            return True
        num_segments = data[body - 1]
        place = body + num_segments + sum(data[body : body + num_segments])
    return place > len(data)


def _mono(file: Any) -> np.ndarray:
    """The mean of the channels, decoded block by block, up to the header's length."""
    rows = max(1, _BLOCK_VALUES // file.channels)
    parts: list[np.ndarray] = [np.zeros(0, np.float32)]
    left = file.frames
    while left > 0:
        block = file.read(min(rows, left), dtype="float32", always_2d=True)
        if not len(block):
            break
        left -= len(block)
        parts.append(block[:, 0] if file.channels == 1 else block.mean(1))
    return np.concatenate(parts)


def _resampled_length(frames: int, rate: int) -> int:
    return frames if rate == RATE else math.ceil(frames * RATE / rate)


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    found: np.ndarray = soxr.resample(samples, rate, RATE, quality="HQ")
    return found
