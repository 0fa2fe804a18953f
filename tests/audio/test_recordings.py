"""Recordings of every format to samples; broken ones to codes, measured in a process of its own."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr

from pipeline import audio, media
from pipeline.errors import RowError
from pipeline.rows import ImageRef
from pipeline.settings import InputSettings
from pipeline.video_probe import VideoProber
from tests.helpers.videos import video

SETTINGS = InputSettings(path="-", audio="audio", max_audio_sec=20.0)
LIMIT = 20.0


def tone(frames: int, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    time = np.arange(frames) / rate
    waves = [0.4 * np.sin(2 * np.pi * 220 * (c + 1) * time) for c in range(channels)]
    return np.stack(waves, 1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", **how: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, **how)
    return out.getvalue()


def samples_of(data: bytes) -> np.ndarray:
    return audio.read_samples(data, audio.probe(data, LIMIT))


def test_plain_samples_come_as_they_are() -> None:
    samples = tone(5000)
    assert (samples_of(encoded(samples, subtype="FLOAT")) == samples[:, 0]).all()
    assert np.abs(samples_of(encoded(samples, kind="FLAC")) - samples[:, 0]).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged_and_rates_resampled(rate: int, channels: int) -> None:
    samples = tone(rate * 2 + 7, rate, channels)
    found = samples_of(encoded(samples, rate, subtype="FLOAT"))
    expected = soxr.resample(samples.mean(1), rate, 16_000, quality="HQ")
    assert len(found) == -(-len(samples) * 16_000 // rate)
    assert np.abs(found[: len(expected)] - expected[: len(found)]).max() < 1e-6


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG", "AIFF", "RF64"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_formats(kind: str, rate: int) -> None:
    samples = tone(rate * 3, rate, 2)
    found = samples_of(encoded(samples, rate, kind))
    assert abs(len(found) - 48_000) < 16_000 * 0.15
    assert found.dtype == np.float32
    assert 0.15 < found.std() < 0.4


def streamed(kind: str, codec: str, rate: int = 44_100, sec: float = 2.0) -> bytes:
    """Two channels through PyAV."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout = "stereo"
        samples = np.ascontiguousarray(tone(int(rate * sec), rate, 2).T)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "codec", "rate"),
    [("ipod", "aac", 44_100), ("adts", "aac", 16_000), ("webm", "libopus", 48_000)],
)
def test_formats_of_streams(kind: str, codec: str, rate: int) -> None:
    found = samples_of(streamed(kind, codec, rate))
    assert abs(len(found) - 32_000) < 16_000 * 0.15
    assert 0.15 < found.std() < 0.4


def test_the_sound_of_a_video() -> None:
    assert abs(len(samples_of(video(sound=True, num_frames=20))) - 32_000) < 4_000
    with pytest.raises(RowError, match="no sound") as caught:
        samples_of(video(num_frames=3))
    assert caught.value.code == "not_audio"


def mp3(sec: float = 7.3, rate: int = 44_100, **how: str) -> bytes:
    return encoded(tone(int(rate * sec), rate, 2), rate, "MP3", **how)


def test_an_mp3_is_what_libsndfile_hears() -> None:
    """With its tag, both trim what the encoder added."""
    data = mp3(2.0, 16_000)
    theirs, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    found = samples_of(data)
    assert len(found) == len(theirs)
    assert np.abs(found - theirs.mean(1)).max() < 1e-4


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_its_tag_is_heard_to_its_end(mode: str) -> None:
    """libsndfile takes it for a seventh as long."""
    data = mp3(bitrate_mode=mode)
    bare = data[data.find(b"\xff\xfb", 4) :]
    assert abs(len(samples_of(bare)) - 7.3 * 16_000) < 0.1 * 16_000
    tagged = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + data + b"TAG" + bytes(125)
    assert len(samples_of(tagged)) == 7.3 * 16_000


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def wav_header(num_bytes: int, rate: int = 16_000, channels: int = 1) -> bytes:
    block = 2 * channels
    fields = struct.pack("<HHIIHH", 1, channels, rate, (rate * block) & 0xFFFFFFFF, block, 16)
    head = b"RIFF" + struct.pack("<I", (num_bytes + 36) & 0xFFFFFFFF) + b"WAVEfmt "
    return head + struct.pack("<I", 16) + fields + b"data" + struct.pack("<I", num_bytes)


LONG = tone(16_000 * 10)
MP3_CODES = {"corrupt_audio", "not_audio", "truncated_audio", "empty_audio"}
NAN = np.full((900, 1), np.nan, np.float32)
SILENCE = np.zeros((8000 * 2000, 1), np.int16)
BROKEN = {
    "noise": (np.random.default_rng(0).bytes(5000), {"not_audio"}),
    "text": (b"this is no recording at all", {"not_audio"}),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), {"not_audio"}),
    "cut flac": (cut(encoded(LONG, kind="FLAC"), 0.5), {"truncated_audio", "corrupt_audio"}),
    "cut wav": (cut(encoded(LONG), 0.5), {"truncated_audio"}),
    "cut aiff": (cut(encoded(LONG, kind="AIFF"), 0.5), {"truncated_audio"}),
    "cut ogg": (cut(encoded(LONG, kind="OGG"), 0.9), {"truncated_audio"}),
    "cut opus": (cut(encoded(LONG, kind="OGG", subtype="OPUS"), 0.99), {"truncated_audio"}),
    "cut mp3": (cut(encoded(LONG, kind="MP3"), 0.5), {"truncated_audio"}),
    "cut header": (encoded(LONG)[:20], {"not_audio", "corrupt_audio", "empty_audio"}),
    "no samples": (encoded(LONG[:0]), {"empty_audio"}),
    "numberless": (encoded(NAN, subtype="FLOAT"), {"corrupt_audio"}),
    "long mp3": (mp3(21.0), {"audio_too_long"}),
    "mp3 of noise": (mp3(0.5)[:200] + np.random.default_rng(0).bytes(9000), MP3_CODES),
    "cut m4a": (cut(streamed("ipod", "aac"), 0.5), {"corrupt_audio"}),
    "too long": (encoded(tone(16_000 * 21)), {"audio_too_long"}),
    "too long, unheard": (encoded(SILENCE, 8000, "FLAC"), {"audio_too_long"}),
    "absurd rate": (wav_header(2000, rate=3) + bytes(2000), {"corrupt_audio", "audio_too_long"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ones_have_a_code(name: str) -> None:
    data, codes = BROKEN[name]
    with pytest.raises(RowError) as caught:
        samples_of(data)
    assert caught.value.code in codes


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG", "ipod", "webm"])
def test_damage_is_an_error_or_samples(kind: str) -> None:
    """Whatever is cut or changed: the promised samples, all of them numbers, or a RowError."""
    codecs = {"ipod": "aac", "webm": "libopus"}
    if kind in codecs:
        whole = streamed(kind, codecs[kind], 48_000)
    else:
        whole = encoded(tone(16_000 * 2), kind=kind)
    rng = np.random.default_rng(1)
    for trial in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(0, 256)
        damaged = cut(bytes(data), rng.uniform(0.05, 1.0) if trial % 2 else 1.0)
        try:
            expected = audio.probe(damaged, LIMIT)
            found = audio.read_samples(damaged, expected)
        except RowError:
            continue
        assert len(found) == expected
        assert np.isfinite(found).all()


@pytest.fixture(scope="module")
def prober() -> Iterator[VideoProber]:
    prober = VideoProber(SETTINGS)
    yield prober
    prober.close()


def test_the_process_that_measures(prober: VideoProber) -> None:
    assert prober.probe_audio(encoded(tone(44_100, 44_100), 44_100)) == 16_000
    for name, (data, codes) in BROKEN.items():
        if name in ("noise", "text", "no samples", "too long"):
            with pytest.raises(RowError) as caught:
                prober.probe_audio(data)
            assert caught.value.code in codes
    assert prober.probe_audio(encoded(tone(123))) == 123


def test_loading(tmp_path: object) -> None:
    data = encoded(tone(900))
    assert media.load(ImageRef(data=data, kind="audio"), SETTINGS) == data
    for ref, code in [
        (ImageRef(data=b"", kind="audio"), "empty_audio"),
        (ImageRef(path="", kind="audio"), "missing_audio"),
        (ImageRef(path=f"{tmp_path}/none.wav", kind="audio"), "missing_file"),
    ]:
        with pytest.raises(RowError) as caught:
            media.load(ref, SETTINGS)
        assert caught.value.code == code
    small = SETTINGS.model_copy(update={"max_audio_bytes": 100})
    with pytest.raises(RowError, match="more than 100 bytes"):
        media.load(ImageRef(data=data, kind="audio"), small)
