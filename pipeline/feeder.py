"""Items in their order, their images decoded by worker processes into shared memory.

A producer thread walks the items (and with them reading, preparing and planning); a dispatcher
thread hands decode tasks to the workers and replaces workers that die. Memory is bounded: an item
gets its room before it is decoded and keeps it until `Fed.release`. Knows no device. Imports no torch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.arena import Arena, Room
from pipeline.decode_pool import DecodePool
from pipeline.decode_worker import Task, pixels_of, read_spool
from pipeline.errors import RowError
from pipeline.rows import Group, PlacedImage, Prefix

MAX_ITEMS_AHEAD = 512


class _End:
    """Everything was delivered."""

    def __repr__(self) -> str:
        return "END"


END: Any = _End()


@dataclass(slots=True)
class Fed:
    """An item with its images [H, W, 3] uint8, or the error of each, in `item.images` order."""

    item: Prefix | Group
    images: tuple[np.ndarray | RowError, ...]
    release: Callable[[], None] = field(default=lambda: None)


@dataclass(slots=True, eq=False)
class _Pending:
    """An item on its way."""

    item: Prefix | Group
    tasks: list[Task]
    room: Room | None
    results: list[RowError | None]
    num_open: int


class Feeder:
    """Owns the worker processes; serves one feed at a time."""

    def __init__(self, workers: int, max_bytes: int, max_pixels: int, resize: bool) -> None:
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self.resize = resize
        self.pool = DecodePool(workers, max_pixels) if workers else None
        self.arena = Arena() if workers else None

    def feed(self, items: Iterable[Prefix | Group]) -> Feed:
        """Start delivering `items`; they are iterated in a thread of the feed."""
        return Feed(self, iter(items))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        if self.arena is not None:
            self.arena.close()


class Feed:
    """One pass over items. `get` in their order; `close` when done or no longer wanted."""

    def __init__(self, feeder: Feeder, items: Iterator[Prefix | Group]) -> None:
        self._feeder = feeder
        self._items = items
        self._queue: deque[_Pending] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._exhausted = False
        self._closed = False
        self._producer: threading.Thread | None = None
        if feeder.pool is not None:
            self._producer = threading.Thread(target=self._produce, name="feeder", daemon=True)
            self._producer.start()

    def get(self, timeout: float | None) -> Any:
        """The next item as `Fed`; None when none is ready in time; END after the last."""
        if self._feeder.pool is None:
            return self._inline()
        with self._changed:
            self._changed.wait_for(self._ready, timeout)
            if self._queue and self._queue[0].num_open == 0:
                pending = self._queue.popleft()
                self._changed.notify_all()
                return self._deliver(pending)
            if self._error is not None:
                raise self._error
            return END if self._exhausted and not self._queue else None

    def close(self) -> None:
        """Stop; what was not delivered is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._feeder.arena is not None:
            self._feeder.arena.wake()
        if self._producer is not None:
            self._producer.join()
        if self._feeder.pool is not None:
            self._feeder.pool.cancel()
        for pending in self._queue:
            if pending.room is not None:
                pending.room.release()
        self._queue.clear()

    def _ready(self) -> bool:
        if self._queue:
            return self._queue[0].num_open == 0
        return self._exhausted or self._error is not None

    def _deliver(self, pending: _Pending) -> Fed:
        room = pending.room
        images: list[np.ndarray | RowError] = []
        for task, error in zip(pending.tasks, pending.results, strict=True):
            if error is not None:
                images.append(error)
                continue
            assert room is not None
            width, height = task.out_size
            images.append(room.array((height, width, 3), task.place))
        return Fed(pending.item, tuple(images), room.release if room is not None else _nothing)

    def _inline(self) -> Any:
        item = next(self._items, END)
        if item is END:
            return END
        found: list[np.ndarray | RowError] = []
        for number, image in enumerate(item.images):
            task = self._task(number, image, "", 0)
            try:
                data = read_spool(task.path, task.offset, task.num_bytes)
                found.append(pixels_of(data, task, self._feeder.max_pixels))
            except RowError as error:
                found.append(error)
        return Fed(item, tuple(found))

    # the producer's thread

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._room_ahead():
                    return
                self._start(item)
        except BaseException as error:  # noqa: BLE001 - raised again by `get`, in its order
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()

    def _room_ahead(self) -> bool:
        """Wait until few enough items are ahead; False when the feed was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._queue) < MAX_ITEMS_AHEAD)
            return not self._closed

    def _start(self, item: Prefix | Group) -> None:
        pool, arena = self._feeder.pool, self._feeder.arena
        assert pool is not None and arena is not None
        plain = [self._task(0, image, "", 0) for image in item.images]
        room = None
        if plain:
            room = arena.take(sum(t.out_bytes for t in plain), lambda: self._closed)
            if room is None:
                return
        tasks, place = [], room.start if room is not None else 0
        for image, size in zip(item.images, plain, strict=True):
            assert room is not None
            tasks.append(self._task(pool.next_number(), image, room.name, place))
            place += size.out_bytes
        pending = _Pending(item, tasks, room, [None] * len(tasks), len(tasks))
        with self._changed:
            self._queue.append(pending)
            self._changed.notify_all()
        for index, task in enumerate(tasks):
            pool.submit(task, self._finisher(pending, index))

    def _finisher(self, pending: _Pending, index: int) -> Callable[[RowError | None], None]:
        def finish(error: RowError | None) -> None:
            with self._changed:
                pending.results[index] = error
                pending.num_open -= 1
                if pending.num_open == 0:
                    self._changed.notify_all()

        return finish

    def _task(self, number: int, image: PlacedImage, memory: str, place: int) -> Task:
        source, layout = image.image, image.layout
        return Task(
            number=number,
            path=source.spool,
            offset=source.offset,
            num_bytes=source.num_bytes,
            width=source.width,
            height=source.height,
            size=(layout.width, layout.height) if self._feeder.resize else None,
            memory=memory,
            place=place,
        )


def _nothing() -> None:
    """An item without images holds no memory."""
