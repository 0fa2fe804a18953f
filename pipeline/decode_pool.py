"""The decode processes: each has its pipe and a few tasks; one that dies is replaced.

A task whose process died is done again; one that brought two down ends as `worker_crash`. Knows
no item and no order of delivery.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline import decode_worker
from pipeline.decode_worker import Task
from pipeline.errors import RowError

TASKS_A_WORKER = 2  # one at work, one at hand
MAX_CRASHES = 2

Finish = Callable[[RowError | None], None]


@dataclass(slots=True, eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    tasks: deque[Task] = field(default_factory=deque)


class DecodePool:
    """Decodes tasks in any order; `finish` of each is called in the pool's thread."""

    def __init__(self, num_workers: int, max_pixels: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._max_pixels = max_pixels
        self._numbers = itertools.count()
        self._waiting: deque[Task] = deque()
        self._finish: dict[int, Finish] = {}
        self._crashes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._wake_out, self._wake_in = os.pipe()
        self._closing = False
        self._workers = [self._spawn() for _ in range(num_workers)]
        self._thread = threading.Thread(target=self._run, name="decode-pool", daemon=True)
        self._thread.start()

    def next_number(self) -> int:
        return next(self._numbers)

    def submit(self, task: Task, finish: Finish) -> None:
        with self._lock:
            self._finish[task.number] = finish
            self._waiting.append(task)
        self._wake()

    def cancel(self) -> None:
        """Forget waiting tasks, and what running ones will say; wait until none runs."""
        with self._lock:
            self._waiting.clear()
            self._finish.clear()
        while any(worker.tasks for worker in self._workers) and self._thread.is_alive():
            self._wake()
            self._thread.join(0.01)

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join()
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(2)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _spawn(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=decode_worker.main, args=(theirs, self._max_pixels), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _wake(self) -> None:
        os.write(self._wake_in, b".")

    def _run(self) -> None:
        while not self._closing:
            self._assign()
            sources: list[Any] = [self._wake_out]
            for worker in self._workers:
                sources += [worker.pipe, worker.process.sentinel]
            for ready in wait(sources):
                if ready == self._wake_out:
                    os.read(self._wake_out, 4096)
            for number, worker in enumerate(self._workers):
                self._receive(worker)
                if not worker.process.is_alive():
                    self._replace(number)

    def _assign(self) -> None:
        """Hand waiting tasks out, to the workers with the fewest first."""
        for depth in range(TASKS_A_WORKER):
            for worker in self._workers:
                if len(worker.tasks) > depth:
                    continue
                with self._lock:
                    if not self._waiting:
                        return
                    task = self._waiting.popleft()
                worker.tasks.append(task)
                with contextlib.suppress(OSError):  # it died: its tasks are taken back later
                    worker.pipe.send(task)

    def _receive(self, worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                number, error = worker.pipe.recv()
                if worker.tasks and worker.tasks[0].number == number:
                    worker.tasks.popleft()
                self._done(number, error)

    def _done(self, number: int, error: RowError | None) -> None:
        self._crashes.pop(number, None)
        with self._lock:
            finish = self._finish.pop(number, None)
        if finish is not None:
            finish(error)

    def _replace(self, number: int) -> None:
        """A worker died: the task it was at is suspect, the others just go back."""
        dead = self._workers[number]
        dead.pipe.close()
        self._workers[number] = self._spawn()
        tasks = list(dead.tasks)
        if tasks:
            suspect = tasks[0]
            self._crashes[suspect.number] = self._crashes.get(suspect.number, 0) + 1
            if self._crashes[suspect.number] >= MAX_CRASHES:
                tasks = tasks[1:]
                error = RowError("worker_crash", "The image brought a decoding process down twice.")
                self._done(suspect.number, error)
        with self._lock:
            live = [t for t in tasks if t.number in self._finish]
            self._waiting.extendleft(reversed(live))
