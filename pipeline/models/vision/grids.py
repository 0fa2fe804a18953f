"""Tables of Qwen's image towers that depend on the patch grid alone, built on the host.

Patches come in merge order: block by block of `merge` x `merge`, row-major inside and outside; the
blocks are called units. Results are cached by grid. Knows no weights and no device.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Grid = tuple[int, int, int]  # frames, rows, columns of patches


@lru_cache(maxsize=4096)
def patch_positions(grid: Grid, merge: int) -> np.ndarray:
    """Return row and column of each patch, int32 [2, patches]."""
    frames, rows, columns = grid
    shape = (rows // merge, merge, columns // merge, merge)
    place = np.indices((rows, columns), dtype=np.int32)
    ordered = place.reshape(2, *shape).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return np.tile(ordered, (1, frames))


@lru_cache(maxsize=4096)
def window_units(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return units in window order, and for each the number of units of its window.

    Windows are `side` x `side` units, smaller at the right and lower edges.
    """
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    row, column = np.divmod(np.arange(rows * columns), columns)
    windows_across = -(-columns // side)
    window = row // side * windows_across + column // side
    order = np.argsort(window, kind="stable")
    size = np.bincount(window)[window[order]]
    starts = np.arange(frames)[:, None] * (rows * columns)
    return (starts + order).reshape(-1), np.tile(size, frames)


def _taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two table rows that each of `size` points lies between, and their weights."""
    # NOTE: float32 and this order of operations, as transformers computes it.
    place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(place).astype(np.int64)
    part = (place - low).astype(np.float32)
    taps = np.stack([low, low + 1], 1).clip(0, side - 1)
    return taps, np.stack([np.float32(1) - part, np.float32(1) - np.abs(part - np.float32(1))], 1)


@lru_cache(maxsize=1024)
def interpolation(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where and how a learned `side` x `side` table is read for each patch.

    Indices int32 [patches, 4] and weights float32 [patches, 4] (bilinear, corners aligned).
    """
    row, column = patch_positions(grid, merge)
    (row_taps, row_weights), (column_taps, column_weights) = (
        _taps(grid[1], side),
        _taps(grid[2], side),
    )
    index = row_taps[row][:, :, None] * side + column_taps[column][:, None, :]
    weight = row_weights[row][:, :, None] * column_weights[column][:, None, :]
    return index.reshape(-1, 4).astype(np.int32), weight.reshape(-1, 4)
