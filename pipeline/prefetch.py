"""Loads images and videos that rows name by path or URL, many at a time, before they are needed.

One address at a time would leave the device waiting for the network. What rows bring as bytes
passes straight through. Knows no model and no prompt.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from pipeline.errors import RowError
from pipeline.media import load
from pipeline.prompts import message_turns
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings

NUM_THREADS = 16
MAX_ROWS_AHEAD = 32
MAX_HELD_BYTES = 256 << 20  # no further image is begun ahead while as much waits to be used


@dataclass(slots=True)
class _Loading:
    """An address under way, for as long as a row ahead names it."""

    ref: ImageRef
    num_uses: int = 0
    future: Future[bytes] = field(default_factory=Future)


class ImageLoader:
    """Loads images; `ahead` begins what the rows after the present one will ask of `load`."""

    def __init__(self, settings: InputSettings) -> None:
        self._settings = settings
        self._loading: dict[ImageRef, _Loading] = {}  # by what has a path only
        self._queue: SimpleQueue[_Loading | None] = SimpleQueue()
        self._num_threads = 0
        self._held_bytes = 0
        self._room = threading.Condition()

    def ahead(self, rows: Iterable[Row], is_wanted: Callable[[Row], bool]) -> Iterator[Row]:
        """The same rows in their order; for those that are not wanted nothing is loaded."""
        waiting: deque[tuple[Row, list[ImageRef]]] = deque()
        try:
            for row in rows:
                refs = self._refs(row) if is_wanted(row) else []
                for ref in refs:
                    self._begin(ref)
                waiting.append((row, refs))
                while waiting and (not waiting[0][1] or len(waiting) > MAX_ROWS_AHEAD):
                    yield from self._hand_over(waiting)
            while waiting:
                yield from self._hand_over(waiting)
        finally:
            for _, refs in waiting:
                self._end(refs)

    def load(self, ref: ImageRef) -> bytes:
        """The encoded bytes of an image or video. Raises: RowError."""
        loading = self._loading.get(ref) if ref.path is not None else None
        if loading is None or loading.future.cancel():  # not begun yet: quicker here
            return load(ref, self._settings)
        return loading.future.result()

    def close(self) -> None:
        """End the threads; one that a silent server holds ends with the process."""
        for _ in range(self._num_threads):
            self._queue.put(None)
        with self._room:
            self._held_bytes = 0
            self._room.notify_all()

    def _hand_over(self, waiting: deque[tuple[Row, list[ImageRef]]]) -> Iterator[Row]:
        row, refs = waiting.popleft()
        try:
            yield row
        finally:
            self._end(refs)

    def _refs(self, row: Row) -> list[ImageRef]:
        """The addresses that preparing the row will ask for."""
        if row.error is not None:
            return []
        refs = (*row.images, *row.videos, *row.audios)
        if row.messages is not None:
            try:
                refs = message_turns(row, None)[1]
            except RowError:
                return []
        settings = self._settings
        limit = settings.max_images + settings.max_videos + settings.max_audios
        named = [ref for ref in refs[:limit] if ref.path]
        return [ref for ref in named if not str(ref.path).startswith("data:")]

    def _begin(self, ref: ImageRef) -> None:
        loading = self._loading.get(ref)
        if loading is None:
            loading = self._loading[ref] = _Loading(ref)
            loading.future.add_done_callback(self._hold)
            self._queue.put(loading)
            if self._num_threads < min(NUM_THREADS, len(self._loading)):
                name = f"image-loader-{self._num_threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._num_threads += 1
        loading.num_uses += 1

    def _end(self, refs: Iterable[ImageRef]) -> None:
        for ref in refs:
            loading = self._loading[ref]
            loading.num_uses -= 1
            if not loading.num_uses:
                del self._loading[ref]
                loading.future.cancel()
                loading.future.add_done_callback(self._let_go)

    def _hold(self, future: Future[bytes], sign: int = 1) -> None:
        if not future.cancelled() and future.exception() is None:
            with self._room:
                self._held_bytes += sign * len(future.result())
                self._room.notify_all()

    def _let_go(self, future: Future[bytes]) -> None:
        self._hold(future, -1)

    def _work(self) -> None:
        while (loading := self._queue.get()) is not None:
            with self._room:
                self._room.wait_for(lambda: self._held_bytes < MAX_HELD_BYTES)
            future = loading.future
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(load(loading.ref, self._settings))
            except Exception as error:  # noqa: BLE001 - raised again where the image is needed
                future.set_exception(error)
