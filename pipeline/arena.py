"""Shared memory for decoded images: one block, lent in ranges, given back when uploaded.

What is larger than the block gets one of its own, alone. Nothing is left behind when the process
is killed. Knows no image format.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

from pipeline.engine.extents import Extent, ExtentPool
from pipeline.scratch import ScratchFile

ALIGN = 4096
_Told = Callable[[], None]


class Block:
    """Memory that other processes map by `path`."""

    def __init__(self, num_bytes: int) -> None:
        self.size = num_bytes
        self._file = ScratchFile()
        os.ftruncate(self._file.fd, num_bytes)
        self.path = self._file.path
        self.memory = mmap.mmap(self._file.fd, num_bytes)

    def close(self) -> None:
        # NOTE: no `memory.close()`: numpy's arrays would look at nothing. The mapping goes with
        # the last array on it.
        self._file.close()


class Room:
    """`[start, start + size)` of a block, until `release`."""

    def __init__(self, block: Block, start: int, give: Callable[[_Told], None]) -> None:
        self.block = block
        self.start = start
        self._give: Callable[[_Told], None] | None = give

    def array(self, shape: tuple[int, ...], place: int) -> np.ndarray:
        """A view on the memory, valid until `release`."""
        return np.ndarray(shape, np.uint8, self.block.memory, place)

    def release(self, told: _Told = lambda: None) -> None:
        """Give the memory back; `told` is called before anybody who waits looks again."""
        give, self._give = self._give, None
        if give is not None:
            give(told)


class Arena:
    """Lends room; never more than `num_bytes`, or than one larger wish that is served alone."""

    def __init__(self, num_bytes: int) -> None:
        self.size = max(ALIGN, num_bytes // ALIGN * ALIGN)
        self.num_used = 0
        self.peak_bytes = 0
        self._block = Block(self.size)
        self._pool = ExtentPool(0, self.size)
        self._changed = threading.Condition()

    @property
    def path(self) -> str:
        """Of the block that lives as long as the arena."""
        return self._block.path

    def take(
        self,
        num_bytes: int,
        cancelled: Callable[[], bool] = lambda: False,
        full: Callable[[], None] = lambda: None,
    ) -> Room | None:
        """Waits for room; None once `cancelled()` (call `wake` then). `full` tells of a wait."""
        num_bytes = -(-max(1, num_bytes) // ALIGN) * ALIGN
        with self._changed:
            while not cancelled():
                room = self._try(num_bytes)
                if room is not None:
                    self.num_used += num_bytes
                    self.peak_bytes = max(self.peak_bytes, self.num_used)
                    return room
                full()
                self._changed.wait()
        return None

    def wake(self) -> None:
        """Lets those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Frees the memory; views that are still held keep theirs until they go."""
        self._block.close()

    def _try(self, num_bytes: int) -> Room | None:
        if num_bytes > self.size:
            if self.num_used:
                return None
            block = Block(num_bytes)
            return Room(block, 0, lambda told: self._returned(num_bytes, told, block=block))
        if self.num_used > self.size:  # a larger block is out
            return None
        extent = self._pool.take(num_bytes)
        if extent is None:
            return None
        start = extent.start
        return Room(self._block, start, lambda told: self._returned(num_bytes, told, extent=extent))

    def _returned(
        self,
        num_bytes: int,
        told: _Told,
        block: Block | None = None,
        extent: Extent | None = None,
    ) -> None:
        if block is not None:
            block.close()
        with self._changed:
            if extent is not None:
                self._pool.give(extent)
            self.num_used -= num_bytes
            told()
            self._changed.notify_all()
