"""Conversations on which MiniCPM is compared with its official code, and random image sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.helpers.parity import random_image


class Picture(NamedTuple):
    width: int
    height: int
    seed: int = 0


class Wave(NamedTuple):
    """A recording of so many samples at 16 kHz."""

    num_samples: int
    seed: int = 0


Part = str | Picture | Wave


@dataclass(frozen=True)
class Case:
    """Turns of (role, parts)."""

    turns: tuple[tuple[str, tuple[Part, ...]], ...]


def _ask(*parts: Part) -> Case:
    return Case((("user", parts),))


CASES = {
    "text only": _ask("What is in the picture?"),
    "overview only": _ask(Picture(300, 301), "Describe this image in detail."),
    "two by two": _ask(Picture(1024, 768), "How many things are there?"),
    "tiny, enlarged": _ask(Picture(9, 7), "What?"),
    "25 patches a side": _ask(Picture(350, 350), "Read all text."),
    "wide": _ask(Picture(1600, 300), "Read all text in the image as JSON."),
    "very wide": _ask(Picture(1200, 20), "Read."),
    "tall, most slices": _ask(Picture(700, 2600), "And this one?"),
    "system and turns": Case(
        (
            ("system", ("Answer with one word.",)),
            ("user", ("Look at", Picture(640, 480, 1), "and then at", Picture(200, 333, 2))),
            ("assistant", ("Two pictures.",)),
            ("user", (Picture(450, 450, 3), "And this?")),
        )
    ),
    "twelve images": _ask(*[Picture(20 + i, 30, i) for i in range(12)], "How many?"),
}


_SEC = 16_000
SOUND_CASES = {
    "no sound": _ask(Picture(500, 460), "Describe this image in detail."),
    "short": _ask(Wave(9000), "What do you hear?"),
    "three seconds": _ask("Listen:", Wave(3 * _SEC + 1234, 1), "What is said?"),
    "half a minute": _ask(Wave(30 * _SEC, 2)),
    "over half a minute": _ask(Wave(30 * _SEC + 27_000, 3), "And?"),
    "a minute and a tick": _ask(Wave(60 * _SEC + 170, 4), "And?"),
    "over a minute": _ask(Wave(64 * _SEC + 5, 5), "And?"),
    "with images": Case(
        (
            ("system", ("Answer with one word.",)),
            ("user", (Picture(640, 480, 1), Wave(20_000, 6), "Is it the", Picture(90, 60, 2))),
            ("assistant", ("Yes.",)),
            ("user", ("Sure?",)),
        )
    ),
}


def samples_of(wave: Wave) -> np.ndarray:
    """Tones with noise, loud and soft: float32 in [-1, 1]."""
    rng = np.random.default_rng(wave.seed)
    time = np.arange(wave.num_samples) / _SEC
    tones = sum(np.sin(2 * np.pi * f * time) for f in rng.uniform(80, 3000, 3))
    loud = 0.3 * np.abs(np.sin(2 * np.pi * time / 1.7))
    noise = 0.02 * rng.standard_normal(wave.num_samples)
    return (loud * tones / 3 + noise).astype(np.float32)


def pixels_of(picture: Picture) -> np.ndarray:
    return random_image(*picture)


def random_sizes(count: int = 2000) -> list[tuple[int, int]]:
    """Widths and heights, extreme ratios among them."""
    rng = np.random.default_rng(5)
    sides = np.exp(rng.uniform(0, np.log(6000), (count, 2))).astype(int)
    return [(int(w), int(h)) for w, h in sides]
