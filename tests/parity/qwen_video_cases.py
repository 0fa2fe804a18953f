"""Videos of every length, rate and size, for what the Qwen video processors make of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pipeline.rows import VideoInfo

# The class's own areas, and those of the checkpoints' files.
SIZES: dict[bool, list[dict[str, Any]]] = {
    False: [{}, {"min_pixels": 3136, "max_pixels": 12_845_056}],
    True: [{}, {"size": {"shortest_edge": 4096, "longest_edge": 25_165_824}}],
}
RATES = (10.0, 24.0, 25.0, 29.97002997, 30.0, 60.0)
COUNT = 250


def cases(newer: bool) -> Iterator[tuple[VideoInfo, dict[str, Any]]]:
    """(video, rule) that the processors accept."""
    rng = random.Random(int(newer))
    for _ in range(COUNT):
        info = VideoInfo(
            width=rng.randint(20, 1500),
            height=rng.randint(20, 1000),
            num_frames=rng.choice([2, 3, 5, rng.randint(2, 50), rng.randint(2, 2000)]),
            fps=rng.choice([*RATES, rng.uniform(1, 120)]),
        )
        rule: dict[str, Any] = {"fps": rng.choice([0.5, 1.0, 2.0, 3.3])}
        if rng.random() < 0.3:
            rule = {"num_frames": rng.choice([2, 4, 7, 8, 16, 32])}
            if not newer and round(rule["num_frames"] / 2) * 2 > info.num_frames:
                rule = {"fps": 2.0}
        yield info, rule
