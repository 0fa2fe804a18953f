"""The geometry of LLaVA's pictures: square ones, and tiles of the resolution that fits best.

Pure arithmetic on sizes, (height, width) throughout. Knows no checkpoint and no tensor. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.rows import View

Size = tuple[int, int]
POOL_ABOVE = 1.1  # features beyond max_tiles by this much a side are pooled


def best_resolution(height: int, width: int, pinpoints: Sequence[Size]) -> Size:
    """The resolution that keeps most of the image; of equal ones the smallest, then the first."""
    best, kept_most, wasted_least = pinpoints[0], 0, math.inf
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = wide * tall - kept
        if kept > kept_most or (kept == kept_most and wasted < wasted_least):
            best, kept_most, wasted_least = (tall, wide), kept, wasted
    return best


def fitted(height: int, width: int, target: Size) -> Size:
    """The image's size inside `target`, its aspect ratio kept."""
    tall, wide = target
    scale_w, scale_h = wide / width, tall / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), tall), wide
    return tall, min(math.ceil(width * scale_h), wide)


def unpadded(height: int, width: int, grid: Size, rounded: bool) -> Size:
    """Rows and columns of a feature grid that show the image and not the border around it.

    `rounded` is transformers' way: a product that misses a whole number by a rounding error counts
    as that number; the original code cuts it off.
    """
    rows, columns = grid
    if width / height > columns / rows:
        shown = height * (columns / width)
        return rows - 2 * ((rows - _whole(shown, rounded)) // 2), columns
    shown = width * (rows / height)
    return rows, columns - 2 * ((columns - _whole(shown, rounded)) // 2)


def _whole(value: float, rounded: bool) -> int:
    return int(round(value, 7)) if rounded else int(value)


def pooled(grid: Size, patches: int, max_tiles: int | None) -> Size:
    """Rows and columns after pooling to `max_tiles` tiles of `patches` a side."""
    rows, columns = grid
    if max_tiles is None:
        return grid
    ratio = math.sqrt(rows * columns / (max_tiles * patches**2))
    if ratio <= POOL_ABOVE:
        return grid
    return int(rows // ratio), int(columns // ratio)


def tile_views(height: int, width: int, resolution: Size, side: int) -> tuple[View, View]:
    """The whole image squashed into one tile, and the canvas that is cut into tiles."""
    tall, wide = resolution
    rows, columns = fitted(height, width, resolution)
    offset = ((tall - rows) // 2, (wide - columns) // 2)
    return View(side, side, (side, side)), View(tall, wide, (rows, columns), offset)


def padded_view(height: int, width: int, side: int, fill: tuple[int, int, int]) -> View:
    """The image set in the middle of a square of its longer side, that resized."""
    longer = max(height, width)
    top, left = (longer - height) // 2, (longer - width) // 2
    box = (-left, -top, longer - left, longer - top)
    return View(side, side, (side, side), fill=fill, box=box)


def cropped_view(height: int, width: int, side: int) -> View:
    """The shorter side resized to `side`, the middle of the longer one kept."""
    shorter, longer = min(height, width), max(height, width)
    long = int(side * longer / shorter)
    resized = (side, long) if width >= height else (long, side)
    offset = (-((resized[0] - side) // 2), -((resized[1] - side) // 2))
    return View(side, side, resized, offset)
