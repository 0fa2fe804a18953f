"""How MiniCPM-o cuts sounds into pieces for its encoder, and which frames it keeps.

Sounds over 30 seconds are cut; the last piece of such a sound is encoded as its reference does it,
with silence after it that its last chunk hears. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.models.audio.mel import HOP, PIECE, num_frames
from pipeline.models.audio.whisper import Shape


@dataclass(frozen=True, slots=True)
class SoundPiece:
    """A run of one sound's samples, and the tokens that come of it."""

    number: int  # in the order of the sounds' tokens
    sound: int
    start: int
    stop: int
    num_tokens: int
    mel_frames: int
    shape: Shape


def num_tokens(mel_frames: int, pool: int) -> int:
    """Tokens of a sound: frames are halved by the convolutions, then averaged by `pool`."""
    return max(0, ((mel_frames - 1) // 2 + 1 - pool) // pool + 1)


def pieces(sounds: Sequence[int], chunk: int, pool: int) -> list[SoundPiece]:
    """The pieces of sounds of so many samples, those of one shape side by side."""
    found = [
        _piece(number, sound, start, min(start + PIECE, samples), samples > PIECE, chunk, pool)
        for number, (sound, start, samples) in enumerate(_cuts(sounds))
    ]
    kept = [piece for piece in found if piece.num_tokens]
    return sorted(kept, key=lambda p: (p.shape.frames, p.shape.heard, p.mel_frames))


def _cuts(sounds: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    for sound, samples in enumerate(sounds):
        for start in range(0, samples, PIECE):
            yield sound, start, samples


def _piece(
    number: int, sound: int, start: int, stop: int, cut: bool, chunk: int, pool: int
) -> SoundPiece:
    mel = num_frames(stop - start)
    frames = (mel - 1) // 2 + 1
    shape = Shape(mel, frames, frames)
    whole = PIECE // HOP
    if cut and mel < whole:
        # NOTE: the reference pads this piece to the others' length and masks it by its number of
        # mel frames, which is about twice that of the encoder's.
        padded = min(whole // 2, -(-frames // chunk) * chunk)
        shape = Shape(min(whole, 2 * padded + 4), padded, min(padded, mel))
    return SoundPiece(number, sound, start, stop, num_tokens(mel, pool), mel, shape)
