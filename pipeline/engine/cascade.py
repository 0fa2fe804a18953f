"""Which ranges of the cache several running lanes share, as the table that a step reads them by.

Made on the host when the running lanes change. Knows sequences and their ranges; no tensor, no
kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.engine.sequence import Sequence
from pipeline.engine.slots import MAX_SEGMENTS

MIN_LENGTH = 128  # of a range that is worth a tile of its own
MIN_SAVED = 0.2  # of all keys read, below which lanes read alone


@dataclass(frozen=True, slots=True)
class SharedTable:
    """`items` int32 [I, 3 + L] and `taken` bool [B, S], as `SharedReads` has them."""

    items: np.ndarray
    taken: np.ndarray


def max_items(num_lanes: int, lanes_per_item: int) -> int:
    """Room for the groups of most batches; a batch that needs more reads alone."""
    return num_lanes // 2 + num_lanes // lanes_per_item + 8


def share(sequences: Iterable[Sequence], lanes_per_item: int) -> SharedTable | None:
    """The table of lanes in this order, or None where sharing saves too little."""
    listed = list(sequences)
    readers: dict[tuple[int, int], list[int]] = {}  # (start of a range, segment) -> columns
    lengths: dict[int, int] = {}
    keys = 0
    for column, sequence in enumerate(listed):
        keys += sequence.request.num_tokens + len(sequence.output_ids)
        held = sequence.segments
        for number, (start, length) in enumerate(held):
            if length >= MIN_LENGTH:
                lengths[start] = length
                segment = MAX_SEGMENTS - 1 - len(held) + number
                readers.setdefault((start, segment), []).append(column)
    items: list[list[int]] = []
    taken = np.zeros((len(listed), MAX_SEGMENTS), bool)
    saved = 0
    for (start, segment), columns in readers.items():
        if len(columns) < 2:
            continue
        taken[columns, segment] = True
        for first in range(0, len(columns), lanes_per_item):
            part = columns[first : first + lanes_per_item]
            saved += (len(part) - 1) * lengths[start]
            padding = [-1] * (lanes_per_item - len(part))
            items.append([segment, start, lengths[start], *part, *padding])
    if saved < MIN_SAVED * keys or len(items) > max_items(len(listed), lanes_per_item):
        return None
    return SharedTable(np.array(items, np.int32).reshape(-1, 3 + lanes_per_item), taken)
