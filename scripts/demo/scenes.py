"""Samples scenes: which drawings, on which discs, where, before which background.

A scene is a plain description; render.py draws it and language.py talks about it.
Objects are always kept from left to right, far enough apart that the order is plain to see.
"""

import random
from dataclasses import dataclass, field

import numpy as np

from demo.vocabulary import (
    COLOUR_NAMES,
    COLOURS,
    DIAMETERS,
    HEIGHT,
    MOST_OBJECTS,
    NOUNS,
    SIZES,
    WIDTH,
)

ROWS = {"top": (31.0, 58.0), "bottom": (HEIGHT - 58.0, HEIGHT - 31.0)}
HALVES = {"left": (31.0, 92.0), "right": (WIDTH - 92.0, WIDTH - 31.0)}
LEAST_STEP = 30.0
EMPTY_SHARE = 0.03


@dataclass(frozen=True)
class Object:
    """One drawing on a disc: the words for it, and how exactly it is drawn."""

    noun: int
    artist: int
    colour: int
    large: bool
    row: str
    x: float
    y: float
    diameter: float
    angle: float
    flip: bool
    disc: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Objects from left to right, and the background they lie on."""

    objects: tuple[Object, ...]
    photograph: int  # -1: a plain background
    crop: tuple[float, float, float]  # size as a share of the photograph, and where (0…1, 0…1)
    mirrored: bool
    wash: float  # how far the photograph is drawn to its mean colour
    plain: tuple[tuple[int, int, int], tuple[int, int, int]] = field(default=((0, 0, 0), (0, 0, 0)))


def legible(sprites: np.ndarray, there: np.ndarray) -> dict[tuple[int, int], tuple[int, ...]]:
    """For each drawing, the colours of disc it does not sink into; at least the best three."""
    discs = np.array([COLOURS[c] for c in COLOUR_NAMES], np.float32)
    out = {}
    for artist, noun in zip(*np.nonzero(there), strict=True):
        pixels = sprites[artist, noun].reshape(-1, 4).astype(np.float32)
        pixels = pixels[pixels[:, 3] > 200, :3]
        near = (np.linalg.norm(pixels[:, None] - discs[None], axis=2) < 75).mean(0)
        order = np.argsort(near, kind="stable")
        out[int(artist), int(noun)] = tuple(
            int(c) for i, c in enumerate(order) if i < 3 or near[c] < 0.35
        )
    return out


class Sampler:
    """Draws random scenes from the artists and photographs it was given."""

    def __init__(
        self,
        artwork: dict,
        artists: tuple[int, ...],
        photographs: int,
        mix: bool = True,
        most: int = MOST_OBJECTS,
    ):
        """`mix`: several artists in one scene; `photographs`: how many the renderer has."""
        there = artwork["there"]
        self.colours = legible(artwork["small"], there)
        self.artists = artists
        self.nouns = {a: [n for n in range(len(NOUNS)) if there[a][n]] for a in artists}
        self.photographs, self.mix, self.most = photographs, mix, most

    def scene(self, rng: random.Random, count: int | None = None) -> Scene:
        """One scene of `count` objects, or of 0 to 4."""
        if count is None:
            count = 0 if rng.random() < EMPTY_SHARE else rng.randint(1, self.most)
        return Scene(self._objects(rng, count), *self._background(rng))

    def _background(self, rng: random.Random) -> tuple:
        photograph = rng.randrange(self.photographs) if rng.random() < 0.6 else -1
        size = rng.uniform(0.6, 0.95)
        first = tuple(rng.randrange(256) for _ in range(3))
        second = tuple(min(255, max(0, v + rng.randint(-40, 40))) for v in first)
        where = (size, rng.random(), rng.random())
        return photograph, where, rng.random() < 0.5, rng.uniform(0.25, 0.6), (first, second)

    def _objects(self, rng: random.Random, count: int) -> tuple[Object, ...]:
        artist = rng.choice(self.artists)
        # Now and then the same noun or colour comes again, so that counting means something.
        nouns: list[int] = []
        colours: list[int] = []
        artists = [rng.choice(self.artists) if self.mix else artist for _ in range(count)]
        for a in artists:
            again = [n for n in nouns if n in self.nouns[a]]
            nouns.append(
                rng.choice(again) if again and rng.random() < 0.22 else rng.choice(self.nouns[a])
            )
            free = self.colours[a, nouns[-1]]
            repeat = [c for c in colours if c in free]
            colours.append(rng.choice(repeat if repeat and rng.random() < 0.15 else free))
        sizes = [rng.random() < 0.5 for _ in range(count)]
        diameters = [rng.uniform(*DIAMETERS[SIZES[large]]) for large in sizes]
        rows, places = place(rng, diameters)
        return tuple(
            Object(
                nouns[i],
                artists[i],
                colours[i],
                sizes[i],
                rows[i],
                *places[i],
                diameters[i],
                rng.uniform(-9, 9),
                rng.random() < 0.5,
                _shade(rng, colours[i]),
            )
            for i in range(count)
        )


def _shade(rng: random.Random, colour: int) -> tuple[int, int, int]:
    return tuple(min(255, max(0, v + rng.randint(-9, 9))) for v in COLOURS[COLOUR_NAMES[colour]])


def place(
    rng: random.Random, diameters: list[float]
) -> tuple[list[str], list[tuple[float, float]]]:
    """Rows and centres, from left to right, for discs of these diameters; no two touch."""
    count = len(diameters)
    rows = [rng.choice(("top", "bottom")) for _ in range(count)]
    if count == 1:
        return rows, [
            (rng.uniform(*HALVES[rng.choice(("left", "right"))]), rng.uniform(*ROWS[rows[0]]))
        ]
    slot = WIDTH / max(count, 1)
    for attempt in range(60):
        free = max(0.0, (slot - LEAST_STEP) / 2) * (1 - attempt / 60)
        places = []
        for i, diameter in enumerate(diameters):
            x = slot * (i + 0.5) + rng.uniform(-free, free)
            edge = diameter / 2 + 1
            places.append((min(max(x, edge), WIDTH - edge), rng.uniform(*ROWS[rows[i]])))
        if _apart(places, diameters):
            return rows, places
    return rows, [(slot * (i + 0.5), sum(ROWS[rows[i]]) / 2) for i in range(count)]


def _apart(places: list[tuple[float, float]], diameters: list[float]) -> bool:
    for i in range(len(places)):
        for j in range(i):
            gap = ((places[i][0] - places[j][0]) ** 2 + (places[i][1] - places[j][1]) ** 2) ** 0.5
            if (
                gap < (diameters[i] + diameters[j]) / 2 + 1
                or places[i][0] - places[j][0] < LEAST_STEP - 2
            ):
                return False
    return True
