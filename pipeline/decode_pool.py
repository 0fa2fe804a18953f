"""The decode processes: each has its socket and a few tasks; one that dies or hangs is replaced.

A task whose process died is done again; one that brought two down ends as `worker_crash`. The
processes are fresh interpreters, so that they inherit no thread and no device, and they end by
themselves when this process does. Knows no item and no order of delivery.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from pipeline import helper_process
from pipeline.decode_worker import READY, Task
from pipeline.errors import EngineError, RowError

TASKS_A_WORKER = 2  # one at work, one at hand
MAX_CRASHES = 2
MAX_FAILED_STARTS = 5  # in a row, before the attempt ends
TASK_TIMEOUT_SEC = 120.0

# The allocator keeps what a picture needed for the next one: page faults took half of the time.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "PILLOW_BLOCKS_MAX": "4",
}

Finish = Callable[[RowError | EngineError | None], None]


class _Worker:
    """One process, from this side."""

    def __init__(self, max_pixels: int, arena: str) -> None:
        self.process, self.socket = helper_process.start(
            "pipeline.decode_worker", str(max_pixels), arena, environment=_ENVIRONMENT
        )
        self.tasks: deque[Task] = deque()
        self.ready = False
        self.since = time.monotonic()  # when the first task came to its front
        self._unread = b""

    def send(self, task: Task) -> None:
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        with contextlib.suppress(OSError):  # it died: the task is taken back
            self.socket.sendall(json.dumps(task).encode() + b"\n")

    def receive(self) -> list[list[object]] | None:
        """The messages that have come; None when the process has gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self, patience_sec: float = 0.0) -> None:
        """Waits that long for the process to end by itself, then kills it."""
        self.socket.close()
        helper_process.end(self.process, patience_sec)


class DecodePool:
    """Decodes tasks in any order; each one's `finish` is called in the pool's thread."""

    def __init__(self, num_workers: int, max_pixels: int, arena: str) -> None:
        self._max_pixels, self._arena = max_pixels, arena
        self._numbers = itertools.count()
        self._waiting: deque[Task] = deque()
        self._finish: dict[int, Finish] = {}
        self._crashes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._num_out = 0  # tasks that a process has
        self._failed_starts = 0
        self._closing = False
        self.num_done = 0
        self.num_replaced = 0
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._workers = [self._spawn() for _ in range(num_workers)]
        self._thread = threading.Thread(target=self._run, name="decode-pool", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """Of the processes that live now."""
        return [worker.process.pid for worker in self._workers]

    def next_number(self) -> int:
        """A number for a task, never given twice."""
        return next(self._numbers)

    def submit(self, task: Task, finish: Finish) -> None:
        """Decode the task; `finish(None)` follows, or `finish` of its error."""
        with self._changed:
            self._finish[task.number] = finish
            self._waiting.append(task)
        self._wake()

    def cancel(self) -> None:
        """Forgets all tasks; on return no process writes to memory any more."""
        with self._changed:
            self._waiting.clear()
            self._finish.clear()
            self._changed.wait_for(lambda: not self._num_out or not self._thread.is_alive())

    def close(self) -> None:
        """Ends the processes."""
        self._closing = True
        self._wake()
        self._thread.join()
        for worker in self._workers:
            worker.socket.close()
        for worker in self._workers:
            worker.end(2.0)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _spawn(self) -> _Worker:
        worker = _Worker(self._max_pixels, self._arena)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._wake_in.send(b".")

    # the pool's thread

    def _run(self) -> None:
        while not self._closing:
            self._assign()
            for key, _ in self._selector.select(timeout=1.0):
                if key.data is None:
                    self._wake_out.recv(4096)
                else:
                    self._hear(key.data)
            self._kill_stuck()

    def _assign(self) -> None:
        """Hands waiting tasks out, to the processes with the fewest first."""
        for depth in range(TASKS_A_WORKER):
            for worker in self._workers:
                if len(worker.tasks) > depth or not worker.ready:
                    continue
                with self._changed:
                    if not self._waiting:
                        return
                    task = self._waiting.popleft()
                    self._num_out += 1
                worker.send(task)

    def _hear(self, worker: _Worker) -> None:
        messages = worker.receive()
        if messages is None:
            self._replace(worker)
            return
        for number, code, text in messages:
            if number == READY:
                worker.ready, self._failed_starts = True, 0
                continue
            task = worker.tasks.popleft()
            worker.since = time.monotonic()
            self._done(task, _error(code, text))

    def _done(self, task: Task, error: RowError | EngineError | None) -> None:
        self._crashes.pop(task.number, None)
        with self._changed:
            finish = self._finish.pop(task.number, None)
            self.num_done += 1
        if finish is not None:
            finish(error)
        self._returned(1)

    def _returned(self, count: int) -> None:
        with self._changed:
            self._num_out -= count
            self._changed.notify_all()

    def _kill_stuck(self) -> None:
        for worker in self._workers:
            if worker.tasks and time.monotonic() - worker.since > TASK_TIMEOUT_SEC:
                worker.process.kill()  # it is replaced when its socket closes

    def _replace(self, dead: _Worker) -> None:
        """A process died: the task it was at is suspect, the others just go back."""
        self._selector.unregister(dead.socket)
        dead.end()
        self.num_replaced += 1
        tasks, num_tasks = list(dead.tasks), len(dead.tasks)
        if not dead.ready:
            self._count_failed_start()
        if tasks:
            suspect = tasks[0].number
            self._crashes[suspect] = self._crashes.get(suspect, 0) + 1
            if self._crashes[suspect] >= MAX_CRASHES:
                message = "The image or video brought a decoding process down twice."
                self._done(tasks.pop(0), RowError("worker_crash", message))
                num_tasks -= 1
        with self._changed:
            live = [task for task in tasks if task.number in self._finish]
            self._waiting.extendleft(reversed(live))
        self._returned(num_tasks)
        self._workers[self._workers.index(dead)] = self._spawn()

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        time.sleep(min(1.0, 0.1 * self._failed_starts))
        if self._failed_starts < MAX_FAILED_STARTS:
            return
        error = EngineError("the decoding processes do not start; stderr has their message")
        with self._changed:
            finishes = list(self._finish.values())
            self._finish.clear()
            self._waiting.clear()
        for finish in finishes:
            finish(error)


def _error(code: object, text: object) -> RowError | EngineError | None:
    if code is None:
        return None
    return EngineError(str(text)) if code == "engine" else RowError(str(code), str(text))
