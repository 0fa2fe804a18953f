"""Gemma's pan and scan: crops of long images beside the whole, with words between them.

Off unless model.pan_and_scan or the checkpoint's own do_pan_and_scan asks for it. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.rows import Turn

BEFORE = "Here is the original image "
BETWEEN = " and here are some crops to help you see better "
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class CropRule:
    """When and into how many crops an image is cut."""

    min_side: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2

    @classmethod
    def read(cls, processor: Mapping[str, Any]) -> CropRule:
        """From preprocessor_config.json, which mostly has null for all three."""
        return cls(
            int(processor.get("pan_and_scan_min_crop_size") or 256),
            int(processor.get("pan_and_scan_max_num_crops") or 4),
            float(processor.get("pan_and_scan_min_ratio_to_activate") or 1.2),
        )

    def boxes(self, width: int, height: int) -> list[Box]:
        """Crops along the longer side, none for an image near a square or too small."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return []
        count = min(long // self.min_side, math.floor(long / short + 0.5))
        count = min(self.max_crops, max(2, count))
        step = math.ceil(long / count)
        if min(step, short) < self.min_side:
            return []
        cuts = [(start, min(start + step, long)) for start in range(0, step * count, step)]
        if width >= height:
            return [(start, 0, stop, height) for start, stop in cuts]
        return [(0, start, width, stop) for start, stop in cuts]


@dataclass(frozen=True, slots=True)
class Joints:
    """Ids between the soft tokens of one image's pictures: after the whole, after a crop."""

    whole: np.ndarray
    crop: np.ndarray

    def ids(self, num_pictures: int, soft: np.ndarray) -> np.ndarray:
        """Ids of the image's block, from the first soft token to the last."""
        parts = [soft]
        for number in range(1, num_pictures):
            parts += [self.whole if number == 1 else self.crop, soft]
        return np.concatenate(parts)


def with_crops(
    turns: Sequence[Turn], num_pictures: Sequence[int]
) -> tuple[list[Turn], dict[int, int]]:
    """`turns` with each picture as an image of its own, and the image that each first one opens.

    Texts of user and assistant lose their outer blanks, as the template would have it.
    """
    opens: dict[int, int] = {}
    count = 0
    expanded = []
    for turn in turns:
        parts: list[str | int] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append(part if turn.role == "system" else part.strip())
                continue
            opens[count] = part
            pictures = num_pictures[part]
            words = [BEFORE, BETWEEN, *[" "] * pictures] if pictures > 1 else [""]
            for number in range(pictures):
                parts += [words[number], count + number]
            count += pictures
        expanded.append(Turn(turn.role, tuple(parts)))
    return expanded, opens
