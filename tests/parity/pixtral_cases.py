"""Conversations and image sizes that Pixtral's tests and its recording script share."""

from __future__ import annotations

import numpy as np

from pipeline.rows import Turn

TURNS: dict[str, tuple[Turn, ...]] = {
    "one image": (Turn("user", (0, "Describe the image.")),),
    "text only": (Turn("user", ("What is in the image?",)),),
    "image last": (Turn("user", ("What is in the image? ", 0)),),
    "several images": (Turn("user", (0, 1, "and", 2, "say why. été 图 ﬁ")),),
    "text, two images": (Turn("user", ("Which one? ", 0, 1)),),
    "texts": (Turn("user", ("Look.", "\n What is it?", 0)),),
    "system": (Turn("system", ("Be brief\nand kind.",)), Turn("user", (0, " What is it?"))),
    "dialogue": (
        Turn("system", ("Be brief.",)),
        Turn("user", (0, "How many? ")),
        Turn("assistant", (" Two things.  ",)),
        Turn("user", ("And", 1, "the other?")),
        Turn("assistant", ("A red square",)),
        Turn("user", ("Why?",)),
    ),
}
IMAGES = [(40, 24), (9, 70), (64, 64)]  # width and height of each number


def sizes(count: int = 2000) -> list[tuple[int, int]]:
    """Widths and heights from tiny to huge, also of extreme aspect ratio."""
    rng = np.random.default_rng(7)
    drawn = np.exp(rng.uniform(np.log(4), np.log(6000), (count, 2))).astype(int)
    return [(int(width), int(height)) for width, height in drawn]
