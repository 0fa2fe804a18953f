"""Contiguous ranges of cache places: lent, counted, given back, merged with their neighbours.

Lengths are known before a request starts, so a range never grows and there are no pages. Knows no
tensor and no request.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Extent:
    """Places `[start, start + length)`, held by `num_users` sequences or prefixes."""

    start: int
    length: int
    num_users: int = 1


class ExtentPool:
    """Lends ranges of the places `[first, first + size)`: the smallest free one that fits."""

    def __init__(self, first: int, size: int) -> None:
        self.size = size
        self.num_free = size
        self._free: dict[int, int] = {first: size} if size else {}  # start -> length
        self._ends: dict[int, int] = {first + size: first} if size else {}
        self._by_length: list[tuple[int, int]] = [(size, first)] if size else []

    @property
    def largest(self) -> int:
        return self._by_length[-1][0] if self._by_length else 0

    def take(self, length: int) -> Extent | None:
        """A range of `length` places, or None when no free range is that long."""
        if length == 0:
            return Extent(0, 0)
        at = bisect_left(self._by_length, (length, -1))
        if at == len(self._by_length):
            return None
        size, start = self._by_length[at]
        self._remove(start, size)
        if size > length:
            self._add(start + length, size - length)
        self.num_free -= length
        return Extent(start, length)

    def give(self, extent: Extent) -> None:
        """One user less; the last one frees the range."""
        if extent.num_users <= 0:
            raise ValueError("the extent was given back already")
        extent.num_users -= 1
        if extent.num_users or not extent.length:
            return
        self.num_free += extent.length
        start, length = extent.start, extent.length
        if start in self._ends:
            before = self._ends[start]
            length += self._free[before]
            self._remove(before, self._free[before])
            start = before
        after = start + length
        if after in self._free:
            size = self._free[after]
            self._remove(after, size)
            length += size
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._free[start] = length
        self._ends[start + length] = start
        insort(self._by_length, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._free[start]
        del self._ends[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
