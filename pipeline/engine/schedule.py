"""Which work runs next: fed prefixes and groups become batches that fit lanes, places and tokens.

Order is the planner's. A batch is admitted when it is worth a prefill; until then decoding goes on,
and while batches are ready decoding waits: a step over many lanes costs little more than over few.
Knows extents and sequences; no tensor, no model.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engine.extents import Extent, ExtentPool
from pipeline.engine.sequence import Sequence, failed
from pipeline.errors import RowError
from pipeline.rows import Completion, Group, PlacedImage, Prefix, Request

IDLE_SHARE = 16  # a batch may be smaller while one lane in so many is idle


@dataclass(slots=True, eq=False)
class Piece:
    """A run of prompt tokens to compute: `tokens[start:stop)` of a prompt, written to `extent`."""

    tokens: np.ndarray
    positions: np.ndarray  # [axes, T] of the whole prompt
    start: int
    stop: int
    extent: Extent
    earlier: tuple[tuple[int, int], ...]
    images: tuple[tuple[PlacedImage, Any], ...]  # with their pixels
    sequence: Sequence | None = None  # None: shared, nothing is drawn after it
    owner: PrefixWork | GroupWork | None = None  # of a shared piece
    work: GroupWork | None = None  # of a group's piece
    states: Any = None  # cross_cache.States that the tokens attend to

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Tokens, and what the images' states cost beside them."""
        return self.num_tokens + sum(i.layout.state_cost for i, _ in self.images)


@dataclass(slots=True, eq=False)
class PrefixWork:
    """A prefix: its range, and the images whose features it needs until it is computed."""

    prefix: Prefix
    images: tuple[tuple[PlacedImage, Any], ...]  # with their pixels
    extent: Extent = field(default_factory=lambda: Extent(0, 0))  # empty until its first group
    error: RowError | None = None

    @property
    def is_placed(self) -> bool:
        return self.extent.length > 0

    def place(self, extent: Extent) -> Piece:
        """Give it its range, for those who count on it already; returns the piece to compute."""
        extent.num_users, self.extent = self.extent.num_users, extent
        prefix, images = self.prefix, self.images
        self.images = ()
        return Piece(
            prefix.tokens, prefix.positions, 0, len(prefix.tokens), extent, (), images, owner=self
        )

    def same_as(self, prefix: Prefix) -> bool:
        mine, theirs = self.prefix, prefix
        digests = [[(i.start, i.image.digest) for i in p.images] for p in (mine, theirs)]
        return digests[0] == digests[1] and np.array_equal(mine.tokens, theirs.tokens)


@dataclass(slots=True, eq=False)
class GroupWork:
    """A fed group: what is left of it, and the range that its requests share."""

    group: Group
    pixels: tuple[Any, ...]
    prefix: PrefixWork | None
    waiting: deque[Request] = field(default_factory=deque)
    shared: Extent | None = None  # taken with the first request
    error: RowError | None = None  # its shared tokens could not be computed
    num_admitted: int = 0
    states: Any = None  # of the shared images, where layers attend to them
    num_bytes: int = 0  # of its pixels

    def images_of(self, request: Request) -> tuple[tuple[PlacedImage, Any], ...]:
        """The request's own images, each with its pixels or its RowError."""
        group, found = self.group, []
        pixels = dict(zip(map(_identity, group.images), self.pixels, strict=True))
        for image in request.images:
            if image.start >= group.num_shared_tokens:
                found.append((image, pixels[_identity(image)]))
        return tuple(found)

    def shared_images(self) -> tuple[tuple[PlacedImage, Any], ...]:
        pairs = zip(self.group.images, self.pixels, strict=True)
        limit = self.group.num_shared_tokens
        first = {id(i) for i in self.group.requests[0].images}
        return tuple((i, p) for i, p in pairs if i.start < limit and id(i) in first)


def _identity(image: PlacedImage) -> tuple[Any, ...]:
    return image.start, image.image.digest, image.layout


class Scheduler:
    """Turns fed work into batches of units; hands out lanes and cache ranges."""

    def __init__(
        self, pool: ExtentPool, num_slots: int, prefill_tokens: int, state_pool: Any = None
    ) -> None:
        """`state_pool` is the `cross_cache.StatePool` of a model that has one."""
        self.pool = pool
        self.state_pool = state_pool
        self.prefill_tokens = prefill_tokens
        self.free_lanes = list(range(num_slots))  # a heap: low lanes first
        self.num_slots = num_slots
        self.prefix: PrefixWork | None = None
        self.waiting: deque[GroupWork] = deque()
        self.rejected: list[Completion] = []
        self.num_waiting_tokens = 0
        self.num_waiting_bytes = 0  # of the waiting groups' pixels
        self._afterwards: list[Callable[[], None]] = []

    def _cost(self, group: Group) -> int:
        if self.state_pool is None:
            return group.num_prefill_tokens
        return group.num_prefill_tokens + sum(i.layout.state_cost for i in group.images)

    def add_prefix(self, prefix: Prefix, pixels: Seq[Any]) -> None:
        """Make `prefix` the current one for the groups that follow."""
        if self.prefix is not None and self.prefix.same_as(prefix):
            return
        old, self.prefix = self.prefix, None
        if old is not None:
            self.pool.give(old.extent)
        if len(prefix.tokens) == 0:
            return
        images = tuple(zip(prefix.images, pixels, strict=True))
        error = next((p for _, p in images if isinstance(p, RowError)), None)
        if error is None and len(prefix.tokens) > self.pool.size:
            error = RowError("out_of_memory", "The shared prefix does not fit the cache.")
        self.prefix = PrefixWork(prefix, images, error=error)

    def add_group(self, group: Group, pixels: Seq[Any], num_bytes: int) -> None:
        """Let the group wait; `num_bytes` is what its pixels take of the device."""
        have = len(self.prefix.prefix.tokens) if self.prefix is not None else 0
        if group.num_prefix_tokens not in (0, have):
            raise ValueError(
                f"a group counts on {group.num_prefix_tokens} prefix tokens, not {have}"
            )
        waiting = deque(group.requests)
        work = GroupWork(group, tuple(pixels), self.prefix, waiting, num_bytes=num_bytes)
        self.num_waiting_bytes += num_bytes
        self.waiting.append(work)
        self.num_waiting_tokens += self._cost(group)
        if self.prefix is not None and group.num_prefix_tokens:
            self.prefix.extent.num_users += 1

    def next_batch(self, flush: bool) -> list[Piece]:
        """Pieces of one prefill in their order, or none when it is better to decode on.

        `flush`: no more work will be fed soon, so that a small batch is worth it.
        """
        pieces: list[Piece] = []
        if not self.has_batch(flush):
            return pieces
        budget = self.prefill_tokens
        while self.waiting and self.free_lanes and budget > 0:
            admitted = self._admit(self.waiting[0], budget, alone=not pieces)
            pieces += admitted
            budget -= sum(p.cost for p in admitted)
            if self.waiting[0].waiting:
                break
            self._drop(self.waiting.popleft())
        return pieces

    def has_batch(self, flush: bool) -> bool:
        """Whether `next_batch` would try one now."""
        return bool(self.waiting and self.free_lanes) and (flush or self._worth_it())

    def reject_stuck(self) -> None:
        """Nothing runs and nothing fits: the first waiting request never will."""
        work = self.waiting[0]
        error = RowError("out_of_memory", "The row needs more places than the cache has.")
        self.rejected.append(failed(work.waiting.popleft(), error))
        if not work.waiting:
            self._drop(self.waiting.popleft())

    def _worth_it(self) -> bool:
        """Whether the free lanes take a batch near its full size, or enough of them stand idle."""
        lanes, tokens = len(self.free_lanes), 0.0
        idle = lanes >= self.num_slots // IDLE_SHARE
        enough = self.prefill_tokens // 8 if idle else self.prefill_tokens * 3 // 4
        for work in self.waiting:
            tokens += self._cost(work.group) * min(1, lanes / max(1, len(work.waiting)))
            lanes -= len(work.waiting)
            if tokens >= enough:
                return True
            if lanes <= 0:
                return False
        return False

    def _admit(self, work: GroupWork, budget: int, alone: bool) -> list[Piece]:
        """Pieces of as many of the group's requests as fit; rejects those that never will."""
        error = self._group_error(work)
        if error is not None:
            self.rejected += [failed(r, error) for r in work.waiting]
            work.waiting.clear()
            return []
        pieces = self._base_pieces(work)
        if work.shared is None:
            return pieces
        budget -= sum(p.cost for p in pieces)
        while work.waiting and self.free_lanes:
            request = work.waiting[0]
            own = request.num_tokens - work.group.num_shared_tokens
            own += sum(i.layout.state_cost for i, _ in work.images_of(request))
            if own > budget and not alone:
                break
            error = self._own_error(work, request)
            if error is not None:
                self.rejected.append(failed(work.waiting.popleft(), error))
                continue
            taken = self._take(work, request)
            if taken is None:
                break
            pieces.append(self._own_piece(work, work.waiting.popleft(), *taken))
            budget -= own
            alone = False
        return pieces

    def _take(self, work: GroupWork, request: Request) -> tuple[Extent, Any] | None:
        """The request's range and the states of its images; None when there is no room."""
        own = request.num_tokens - work.group.num_shared_tokens
        extent = self.pool.take(own + request.sampling.max_new_tokens)
        if extent is None or self.state_pool is None or not request.images:
            return None if extent is None else (extent, None)
        if work.states is not None:
            return extent, work.states.shared()
        states = self.state_pool.take(request.images)
        if states is None:
            self.pool.give(extent)
            return None
        self._afterwards.append(lambda: self.state_pool.give_padding(states))
        return extent, states

    def _group_error(self, work: GroupWork) -> RowError | None:
        if work.error is not None:
            return work.error
        if work.group.num_prefix_tokens and work.prefix is not None and work.prefix.error:
            return work.prefix.error
        return next((p for _, p in work.shared_images() if isinstance(p, RowError)), None)

    def _base_pieces(self, work: GroupWork) -> list[Piece]:
        """Prefix and shared pieces that are still to be computed, as far as there is room.

        `work.shared` is None until there was room for all.
        """
        pieces: list[Piece] = []
        group = work.group
        # NOTE: taken here, not when the prefix comes: then running rows may fill the cache.
        if group.num_prefix_tokens and work.prefix is not None and not work.prefix.is_placed:
            extent = self.pool.take(group.num_prefix_tokens)
            if extent is None:
                return pieces
            pieces.append(work.prefix.place(extent))
        if work.shared is None:
            pieces += self._take_shared(work)
        return pieces

    def _take_shared(self, work: GroupWork) -> list[Piece]:
        """Take the range that the group shares, if there is room; its piece if it is not empty."""
        length = work.group.num_shared_tokens - work.group.num_prefix_tokens
        extent = self.pool.take(length)
        if extent is None:
            return []
        if not self._take_shared_states(work):
            self.pool.give(extent)
            return []
        work.shared = extent
        return [self._shared_piece(work, extent)] if length else []

    def _take_shared_states(self, work: GroupWork) -> bool:
        """Whether there is room for the states of the images that the group shares."""
        shared = work.shared_images()
        if self.state_pool is None or not shared:
            return True
        states = self.state_pool.take([image for image, _ in shared])
        if states is not None:
            work.states = states
            self._afterwards.append(lambda: self.state_pool.give_padding(states))
        return states is not None

    def _shared_piece(self, work: GroupWork, extent: Extent) -> Piece:
        group, first = work.group, work.group.requests[0]
        return Piece(
            first.tokens, first.positions, group.num_prefix_tokens, group.num_shared_tokens,
            extent, self._prefix_segment(work), work.shared_images(), owner=work, work=work,
            states=work.states,
        )  # fmt: skip

    def _prefix_segment(self, work: GroupWork) -> tuple[tuple[int, int], ...]:
        if not work.group.num_prefix_tokens or work.prefix is None:
            return ()
        extent = work.prefix.extent
        return ((extent.start, work.group.num_prefix_tokens),)

    def _own_error(self, work: GroupWork, request: Request) -> RowError | None:
        error = next((p for _, p in work.images_of(request) if isinstance(p, RowError)), None)
        needed = request.num_tokens + request.sampling.max_new_tokens
        if error is None and needed > self.pool.size:
            error = RowError("out_of_memory", f"The row needs {needed} cache places.")
        if error is None and self.state_pool is not None:
            if not self.state_pool.could_take(request.images):
                error = RowError("out_of_memory", "The row's images do not fit the cache.")
        return error

    def _own_piece(self, work: GroupWork, request: Request, extent: Extent, states: Any) -> Piece:
        shared = []
        if work.group.num_prefix_tokens and work.prefix is not None:
            shared.append(work.prefix.extent)
        if work.shared is not None and work.shared.length:
            shared.append(work.shared)
        for e in shared:
            e.num_users += 1
        # NOTE: a group's shared tokens are computed for its first request, read by the others.
        cached = sum(e.length for e in shared if work.num_admitted or e is not work.shared)
        work.num_admitted += 1
        sequence = Sequence(request, extent, tuple(shared), cached, heapq.heappop(self.free_lanes))
        sequence.states = states
        return Piece(
            request.tokens, request.positions, work.group.num_shared_tokens, request.num_tokens,
            extent, sequence.segments, work.images_of(request), sequence, work=work,
            states=states,
        )  # fmt: skip

    def _drop(self, work: GroupWork) -> None:
        """The group is wholly admitted: its own hold on ranges ends."""
        self.num_waiting_tokens -= self._cost(work.group)
        self.num_waiting_bytes -= work.num_bytes
        if work.shared is not None:
            self.pool.give(work.shared)
        if work.states is not None:
            self.state_pool.give(work.states)
        if work.group.num_prefix_tokens and work.prefix is not None:
            self.pool.give(work.prefix.extent)

    def batch_has_run(self) -> None:
        """Give back what only the batches so far needed."""
        found, self._afterwards = self._afterwards, []
        for give_back in found:
            give_back()

    def retire(self, sequence: Sequence) -> None:
        """The sequence ended: its lane and ranges are free."""
        heapq.heappush(self.free_lanes, sequence.lane)
        self.pool.give(sequence.own)
        if sequence.states is not None:
            self.state_pool.give(sequence.states)
        for extent in sequence.shared:
            self.pool.give(extent)
