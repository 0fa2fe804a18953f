"""The index tables of one batch of images for Qwen's towers: made on the host, kept on the device.

An image's patches may stand in window order, its windows of one size side by side: each window is
then a run of its own, and the image too, as attention does not ask how keys are ordered. Knows no
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan, plan_attention
from pipeline.kernels.transfer import upload
from pipeline.kernels.window_attention import WindowPlan, plan_windows
from pipeline.models.vision.grids import Grid, interpolation, patch_positions, window_units

KEPT_PLANS = 64


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """Where patches stand and whom they attend to. `order` is None without windows."""

    positions: Tensor  # int32 [2, N] row and column, in the order of the tower
    images: AttentionPlan  # whole images
    windows: WindowPlan | None = None
    order: Tensor | None = None  # int64 [units] image order -> window order
    inverse: Tensor | None = None
    taps: Tensor | None = None  # int64 [N, 4] into the learned position table
    tap_weights: Tensor | None = None  # float32 [N, 4]


class Planner:
    """Makes plans for batches of grids and keeps the latest."""

    def __init__(self, merge: int, like: Tensor, window: int = 0, table_side: int = 0) -> None:
        """Plans are for the device of `like`."""
        self.merge = merge
        self.like = like
        self.device = like.device
        self.window = window  # side of a window in units; 0: full attention everywhere
        self.table_side = table_side  # of the learned position table; 0: there is none
        self._kept = lru_cache(KEPT_PLANS)(self._make)

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        return self._kept(tuple(grids))

    def _make(self, grids: tuple[Grid, ...]) -> TowerPlan:
        positions = np.concatenate([patch_positions(g, self.merge) for g in grids], 1)
        # Frames of a video are images of their own.
        lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        images = plan_attention(lengths, self.device)
        if self.window:
            return self._windowed(grids, positions, lengths, images)
        taps = weights = None
        if self.table_side:
            parts = [interpolation(g, self.merge, self.table_side) for g in grids]
            taps = upload(np.concatenate([p[0] for p in parts]).astype(np.int64), self.device)
            weights = upload(np.concatenate([p[1] for p in parts]), self.device)
        return TowerPlan(upload(positions, self.device), images, taps=taps, tap_weights=weights)

    def _windowed(
        self,
        grids: tuple[Grid, ...],
        positions: np.ndarray,
        lengths: list[int],
        images: AttentionPlan,
    ) -> TowerPlan:
        unit = self.merge**2
        parts = [window_units(g, self.merge, self.window) for g in grids]
        counts = np.array([len(order) for order, _ in parts])
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.concatenate([size for _, size in parts])
        frames = np.repeat(np.arange(len(lengths)), np.array(lengths) // unit)
        # A stable sort keeps each window together: its units are neighbours of one size.
        by_size = np.lexsort((-sizes, frames))
        order = (np.concatenate([order for order, _ in parts]) + starts)[by_size]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        windows = [size * unit for size in _one_each(sizes[by_size].tolist())]
        placed = positions.reshape(2, -1, unit)[:, order].reshape(2, -1)
        return TowerPlan(
            upload(placed, self.device),
            images,
            plan_windows(windows, self.like),
            upload(order, self.device),
            upload(inverse, self.device),
        )


def _one_each(sizes: list[int]) -> Iterator[int]:
    """Each window's size once, of a list that names it for every unit."""
    at = 0
    while at < len(sizes):
        yield sizes[at]
        at += sizes[at]
