"""Items in their order, their images and videos decoded by processes into shared memory.

A producer thread walks the items, and with them reading, preparing and planning; the pool's
thread hands decode tasks to the processes. Memory is bounded: an item gets its room before it is
decoded and keeps it until `Fed.release`. Knows no device. Imports no torch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.arena import Arena, Room
from pipeline.decode_pool import DecodePool
from pipeline.decode_worker import Task, decode_into
from pipeline.errors import EngineError, RowError
from pipeline.images import Transparency
from pipeline.rows import Group, PlacedImage, Prefix

SHARED_BYTES = 768 << 20  # of decoded images, for those who have no wish of their own
MAX_ITEMS_AHEAD = 512
CLOSE_PATIENCE_SEC = 5.0


class _End:
    """Everything was delivered."""

    def __repr__(self) -> str:
        return "END"


END: Any = _End()


@dataclass(slots=True)
class Fed:
    """An item with its images [H, W, 3] uint8, or the error of each, in `item.images` order.

    A video's frames are [F, H, W, 3], of its layout's size already unless it has views,
    and plain views are [F, pixels of all views, 3]. A recording is [samples, 4], the bytes of
    float32 values.

    The arrays lie in shared memory and are dead after `release`, which may be called twice.
    """

    item: Prefix | Group
    images: tuple[np.ndarray | RowError, ...]
    release: Callable[[], None] = field(default=lambda: None)


class _Pending:
    """An item on its way."""

    def __init__(self, item: Prefix | Group, tasks: list[Task], room: Room | None) -> None:
        self.item, self.tasks, self.room = item, tasks, room
        self.errors: list[RowError | None] = [None] * len(tasks)
        self.num_open = len(tasks)

    def fed(self, released: Callable[[], None]) -> Fed:
        room = self.room
        if room is None:
            return Fed(self.item, ())
        images = tuple(
            room.array(task.shape, task.place) if error is None else error
            for task, error in zip(self.tasks, self.errors, strict=True)
        )

        return Fed(self.item, images, lambda: room.release(released))


class Feeder:
    """Owns the worker processes; serves one feed at a time. `workers=0` decodes in `get`.

    At most `max_bytes` of decoded images are held, or one item if it alone needs more.
    """

    def __init__(
        self, workers: int, max_bytes: int, max_pixels: int, resize: bool,
        video_timeout_sec: float = 60.0, transparency: Transparency = "white",
    ) -> None:  # fmt: skip
        self.max_pixels = max_pixels
        self.resize = resize
        self.video_timeout_sec = video_timeout_sec
        self.transparency = transparency
        self.arena = Arena(max_bytes) if workers else None
        self.pool = DecodePool(workers, max_pixels, self.arena.path) if self.arena else None

    def feed(self, items: Iterable[Prefix | Group]) -> Feed:
        """Starts delivering `items`, which are walked in a thread of the feed."""
        return Feed(self, iter(items))

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        if self.pool is None or self.arena is None:
            return {}
        return {
            "decoded_images": self.pool.num_done,
            "replaced_workers": self.pool.num_replaced,
            "peak_bytes": self.arena.peak_bytes,
        }

    def close(self) -> None:
        """Ends the processes and frees the memory."""
        if self.pool is not None:
            self.pool.close()
        if self.arena is not None:
            self.arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def task(self, number: int, image: PlacedImage, room: Room | None, place: int) -> Task:
        """What a worker needs to know of one image."""
        source, layout = image.image, image.layout
        width, height = source.width, source.height
        # A video is resized here whoever resizes images: memory for its frames would be scarce.
        resize = (self.resize or layout.clip is not None) and not layout.views
        return Task(
            number=number,
            path=source.spool,
            offset=source.offset,
            num_bytes=source.num_bytes,
            digest=source.digest.hex(),
            width=width,
            height=height,
            out_width=layout.width if resize else width,
            out_height=layout.height if resize else height,
            memory=room.block.path if room else "",
            memory_size=room.block.size if room else 0,
            place=place,
            frames=layout.clip.frames if layout.clip else (),
            views=layout.packed,
            num_samples=layout.sound.num_samples if layout.sound else 0,
            timeout_sec=self.video_timeout_sec,
            transparency=self.transparency,
        )


class Feed:
    """One pass over items: `get` in their order, `close` when done or no longer wanted."""

    def __init__(self, feeder: Feeder, items: Iterator[Prefix | Group]) -> None:
        self._feeder = feeder
        self._items = items
        self._queue: deque[_Pending] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._exhausted = self._closed = False
        self._full = False  # the producer waits for a release
        self._producer: threading.Thread | None = None
        if feeder.pool is not None:
            self._producer = threading.Thread(target=self._produce, name="feeder", daemon=True)
            self._producer.start()

    def get(self, timeout: float | None) -> Any:
        """The next item as `Fed`; END after the last.

        None when no item was ready in time, or none can be before an earlier one is released.
        Raises: what the items raised; EngineError when decoding is broken.
        """
        if self._feeder.pool is None:
            return self._inline()
        with self._changed:
            self._changed.wait_for(self._answerable, timeout)
            if isinstance(self._error, EngineError):
                raise self._error
            if self._queue and self._queue[0].num_open == 0:
                pending = self._queue.popleft()
                self._changed.notify_all()
                return pending.fed(lambda: self._set_full(False))
            if self._error is not None and not self._queue:
                raise self._error
            return END if self._exhausted and not self._queue else None

    def close(self) -> None:
        """Stops; what was not delivered is dropped. What was stays valid until its release."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._feeder.pool is None or self._feeder.arena is None or self._producer is None:
            return
        self._feeder.arena.wake()
        if self._producer is not threading.current_thread():
            # NOTE: it may be deep in reading a row; then it ends by itself, after that row.
            self._producer.join(CLOSE_PATIENCE_SEC)
        self._feeder.pool.cancel()
        with self._changed:
            dropped = list(self._queue)
            self._queue.clear()
        for pending in dropped:
            if pending.room is not None:
                pending.room.release()

    def _answerable(self) -> bool:
        if isinstance(self._error, EngineError):
            return True
        if self._queue:
            return self._queue[0].num_open == 0
        return self._exhausted or self._full

    def _inline(self) -> Any:
        item = next(self._items, END)
        if item is END:
            return END
        found: list[np.ndarray | RowError] = []
        for image in item.images:
            try:
                task = self._feeder.task(0, image, None, 0)
                pixels = np.empty(task.shape, np.uint8)
                decode_into(pixels, task, self._feeder.max_pixels)
                found.append(pixels)
            except RowError as error:
                found.append(error)
        return Fed(item, tuple(found))

    # the producer's thread

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._has_turn():
                    break
                self._start(item)
        except BaseException as error:  # noqa: BLE001 - raised again by `get`, after the items
            self._error = error
        finally:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            if self._closed and hasattr(self._items, "close"):
                self._items.close()

    def _has_turn(self) -> bool:
        """Waits until few enough items are ahead; False when the feed was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._queue) < MAX_ITEMS_AHEAD)
            return not self._closed

    def _start(self, item: Prefix | Group) -> None:
        """Gives the item its room, its place in the queue, and its images to the pool."""
        pool = self._feeder.pool
        images = item.images
        room = self._take_room(images) if images else None
        if pool is None or (images and room is None):
            return
        tasks, place = [], room.start if room else 0
        for image in images:
            tasks.append(self._feeder.task(pool.next_number(), image, room, place))
            place += tasks[-1].out_bytes
        pending = _Pending(item, tasks, room)
        with self._changed:
            if not self._closed:
                self._queue.append(pending)
                for index, task in enumerate(tasks):
                    pool.submit(task, self._finisher(pending, index))
                self._changed.notify_all()
                return
        if room is not None:
            room.release()

    def _take_room(self, images: tuple[PlacedImage, ...]) -> Room | None:
        arena = self._feeder.arena
        assert arena is not None
        num_bytes = sum(self._feeder.task(0, image, None, 0).out_bytes for image in images)
        room = arena.take(num_bytes, lambda: self._closed, lambda: self._set_full(True))
        self._set_full(False)
        return room

    def _set_full(self, full: bool) -> None:
        with self._changed:
            self._full = full
            self._changed.notify_all()

    def _finisher(
        self, pending: _Pending, index: int
    ) -> Callable[[RowError | EngineError | None], None]:
        def finish(error: RowError | EngineError | None) -> None:
            with self._changed:
                if isinstance(error, EngineError):
                    self._error = error
                else:
                    pending.errors[index] = error
                pending.num_open -= 1
                self._changed.notify_all()

        return finish
