"""Conversations and image sizes that LLaVA's tests and its recording script share."""

from __future__ import annotations

import numpy as np

from pipeline.rows import Turn

TURNS: dict[str, tuple[Turn, ...]] = {
    "one image": (Turn("user", (0, "Describe this image in detail.")),),
    "text only": (Turn("user", ("How many things are there?",)),),
    "system": (Turn("system", ("Be brief\nand kind.",)), Turn("user", (0, "What is in it?"))),
    "several images": (Turn("user", (0, 1, "and", 2, "say why. été 图 ﬁ")),),
    "image last": (Turn("user", ("What is in  the picture ", 0)),),
    "dialogue": (
        Turn("user", (0, "How many?")),
        Turn("assistant", ("Two things.",)),
        Turn("user", ("And", 1, "here?")),
        Turn("assistant", ("A red square",)),
        Turn("user", ("Why?",)),
    ),
}
# Each kind of checkpoint with the official conversation that goes with it.
CONVERSATIONS = {
    "1.5": "vicuna_v1",
    "1.6": "vicuna_v1",
    "1.6-mistral": "mistral_instruct",
    "1.6-yi": "chatml_direct",
    "next-qwen": "qwen_1_5",
    "next-llama3": "llava_llama_3",
    "onevision": "qwen_1_5",
}
ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
IMAGE = -200  # the original code's mark for an image among the ids


def sizes(count: int = 2000) -> list[tuple[int, int]]:
    """Widths and heights from tiny to huge, also of extreme aspect ratio."""
    rng = np.random.default_rng(7)
    drawn = np.exp(rng.uniform(np.log(4), np.log(6000), (count, 2))).astype(int)
    drawn[: count // 4] = np.sort(drawn[: count // 4]) // 14 * 14 + 14
    return [(int(width), int(height)) for width, height in drawn]


def spoken(parts: tuple[str | int, ...]) -> str:
    """A turn's text as the original code takes it, an image being `<image>`."""
    text = ""
    for number, part in enumerate(parts):
        if number and isinstance(parts[number - 1], int):
            text += "\n"
        text += "<image>" if isinstance(part, int) else part
    return text
