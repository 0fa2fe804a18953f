"""How DeepSeek-VL2 cuts an image into pictures, and where their features stand in its block.

A block is the whole view and the tiled view, a newline closing each row of features, a separator
between the two. Knows no weights. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.rows import View


@lru_cache(maxsize=65_536)
def best_resolution(
    width: int, height: int, candidates: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The canvas (width, height) that keeps most pixels; of equals the one that wastes least."""

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = int(width * scale) * int(height * scale)
        kept = min(shown, width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(candidates, key=merit)  # the first of equals


def padded_view(
    width: int, height: int, canvas: tuple[int, int], fill: tuple[int, int, int]
) -> View:
    """The image as large as fits the canvas (width, height), in its middle; as Pillow's `pad`."""
    columns, rows = canvas
    if width / height > columns / rows:
        rows = round(height / width * columns)
    elif width / height < columns / rows:
        columns = round(width / height * rows)
    offset = (round((canvas[1] - rows) * 0.5), round((canvas[0] - columns) * 0.5))
    return View(canvas[1], canvas[0], (rows, columns), offset, fill)


def num_tokens(side: int, rows: int, columns: int) -> int:
    """Tokens of a block whose tiles have `side` x `side` features."""
    return side * (side + 1) + 1 + rows * side * (columns * side + 1)


def block_index(
    side: int, grids: Sequence[tuple[int, int]], newline: int, global_first: bool = True
) -> np.ndarray:
    """For each token of the images' blocks the row of the features that it takes, int64.

    Features of an image's pictures follow one another, `side`² rows each, the whole view first;
    `newline` is the newline's row, the separator's is the next. `grids` are (rows, columns).
    """
    parts, start = [], 0
    for rows, columns in grids:
        whole = _rows(start, side, 1, 1, newline)
        tiled = _rows(start + side**2, side, rows, columns, newline)
        between = np.array([newline + 1])
        parts += [whole, between, tiled] if global_first else [tiled, between, whole]
        start += side**2 * (1 + rows * columns)
    return np.concatenate(parts)


def _rows(start: int, side: int, rows: int, columns: int, newline: int) -> np.ndarray:
    """Features of `rows` x `columns` tiles as one picture's rows, each with its newline."""
    feature = np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
    picture = feature.transpose(0, 2, 1, 3).reshape(rows * side, columns * side) + start
    return np.pad(picture, ((0, 0), (0, 1)), constant_values=newline).reshape(-1)
