"""A request while it generates: its cache ranges, its lane, its tokens so far.

Knows no tensor: the device's view of a lane is `slots.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.extents import Extent
from pipeline.errors import RowError
from pipeline.rows import Completion, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One admitted request. `shared` are the extents before its own: prefix, group."""

    request: Request
    own: Extent
    shared: tuple[Extent, ...]
    num_cached_tokens: int
    lane: int = -1
    output_ids: list[int] = field(default_factory=list)
    num_asked: int = 1  # tokens that the device was asked for, the prompt's own first one included
    finished: bool = False
    grammar: Any = None  # guided.Matcher
    states: Any = None  # cross_cache.States of its images, where layers attend to them

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Earlier (start, length) ranges that hold this prompt's leading tokens."""
        return tuple((e.start, e.length) for e in self.shared if e.length)

    @property
    def most_tokens(self) -> int:
        return self.request.sampling.max_new_tokens

    @property
    def num_own_tokens(self) -> int:
        return self.request.num_tokens - sum(e.length for e in self.shared)

    def completion(self, finish_reason: str, error: RowError | None = None) -> Completion:
        return Completion(
            key=self.request.key,
            output_ids=tuple(self.output_ids),
            finish_reason=finish_reason,
            num_prompt_tokens=self.request.num_tokens,
            num_cached_tokens=self.num_cached_tokens,
            error=error,
        )


def failed(request: Request, error: RowError) -> Completion:
    """The completion of a request that never ran."""
    return Completion(request.key, (), "error", request.num_tokens, 0, error)
