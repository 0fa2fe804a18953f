"""The index tables of one batch of sliced images: made on the host, kept on the device.

Patches come view by view, row by row; a view of several slices is cut here, by indices. Pictures
of one size stand together, so that attention is dense rectangles. Knows no weights and no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan, plan_attention
from pipeline.kernels.transfer import upload
from pipeline.models.vision.navit import table_rows
from pipeline.models.vision.resampler import Places
from pipeline.rows import ImageLayout

KEPT_PLANS = 64
MAX_PATCHES = 32_768  # of one pass of the tower


@dataclass(frozen=True, slots=True)
class Picture:
    """An overview or one slice: its grid of patches, and where they stand among the views'."""

    number: int  # in the order of the images' tokens
    rows: int
    columns: int
    first: int  # patch of the upper left corner
    stride: int  # patches from one row to the next

    @property
    def length(self) -> int:
        return self.rows * self.columns

    def patches(self) -> np.ndarray:
        rows = self.first + self.stride * np.arange(self.rows)
        return (rows[:, None] + np.arange(self.columns)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Pass:
    """The pictures that go through the tower together."""

    order: Tensor  # int64 [N] which patches
    table_rows: Tensor  # int64 [N] of the tower's position table
    places: Places
    attention: AttentionPlan
    side: int  # longest side of a picture in patches


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """One batch: passes, and for each picture, in their order, its number among the images'."""

    passes: tuple[Pass, ...]
    numbers: np.ndarray  # int64 [pictures]


def pictures(layouts: Sequence[ImageLayout], patch: int) -> list[Picture]:
    """Each image's overview, then its slices row by row; `grid` of a layout is that of slices.

    A video counts once for each of its frames.
    """
    found: list[Picture] = []
    start = 0
    for size, shape in _views(layouts):
        high, wide = size[0] // patch, size[1] // patch
        rows, columns = high // shape[0], wide // shape[1]
        for down, right in np.ndindex(*shape):
            first = start + down * rows * wide + right * columns
            found.append(Picture(len(found), rows, columns, first, wide))
        start += high * wide
    return found


def _views(layouts: Sequence[ImageLayout]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Height and width of each view, and the rows and columns that it is cut into."""
    for layout in layouts:
        sizes = [(view.height, view.width) for view in layout.views]
        if layout.clip is not None and not sizes:
            sizes = [(layout.height, layout.width)]
        for _ in range(layout.grid[0] if layout.clip else 1):
            yield from zip(sizes, ((1, 1), layout.grid[1:]), strict=False)


class SlicePlanner:
    """Makes plans for batches of layouts and keeps the latest."""

    def __init__(self, patch: int, side: int, device: torch.device) -> None:
        self.patch = patch
        self.side = side  # of the tower's position table
        self.device = device
        self._kept = lru_cache(KEPT_PLANS)(self._make)

    def plan(self, layouts: Sequence[ImageLayout]) -> SlicePlan:
        return self._kept(tuple(layouts))

    def _make(self, layouts: tuple[ImageLayout, ...]) -> SlicePlan:
        ordered = sorted(pictures(layouts, self.patch), key=lambda p: p.length)
        passes = tuple(self._pass(group) for group in _bounded(ordered))
        return SlicePlan(passes, np.array([p.number for p in ordered], np.int64))

    def _pass(self, group: Sequence[Picture]) -> Pass:
        rows = [np.repeat(np.arange(p.rows), p.columns) for p in group]
        columns = [np.tile(np.arange(p.columns), p.rows) for p in group]
        return Pass(
            order=self._upload([p.patches() for p in group]),
            table_rows=self._upload([table_rows(p.rows, p.columns, self.side) for p in group]),
            places=Places(self._upload(rows), self._upload(columns)),
            attention=plan_attention([p.length for p in group], self.device),
            side=max(max(p.rows, p.columns) for p in group),
        )

    def _upload(self, parts: Sequence[np.ndarray]) -> Tensor:
        return upload(np.concatenate(parts).astype(np.int64), self.device)


def _bounded(ordered: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Cut where the patches so far fill another pass."""
    ends = np.cumsum([p.length for p in ordered])
    numbered = groupby(
        zip(ends, ordered, strict=True), key=lambda pair: (pair[0] - 1) // MAX_PATCHES
    )
    for _, group in numbered:
        yield [picture for _, picture in group]
