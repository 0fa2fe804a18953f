"""A worker in a process of its own: what `WorkerPool` starts, one a device.

Reads the config from its stdin, works until nothing is left or stdin closes, and reports JSON
lines on the pipe that its argument numbers. Not for people: they call `vlm-batch run`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.exits import EXIT_FAILED, EXIT_OK, EXIT_USER
from jobs.progress import Counts
from jobs.signals import EXIT_STOPPED, StopRequest
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.worker import Worker

REPORT_SEC = 0.5
EXIT_DIED = 70  # an attempt failed: a fresh process may do better


class PipeProgress:
    """The worker's side of `Progress`: sends what it is told to the runner."""

    def __init__(self, fd: int) -> None:
        self._pipe = open(fd, "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        self._pending = Counts()
        self._flushed_at = 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._tick, name="report", daemon=True).start()

    def add(self, counts: Counts) -> None:
        with self._lock:
            self._pending.add(counts)
        if time.monotonic() - self._flushed_at > REPORT_SEC:
            self._flush()  # at once after a silence: what dies soon after has made progress

    def stage(self, text: str) -> None:
        self.send({"stage": text})

    def note(self, text: str) -> None:
        self.send({"note": text})

    def alive(self) -> None:
        self.send({"alive": True})

    def found(self, rows: int) -> None:
        self.send({"found": rows})

    def close(self) -> None:
        self._closed.set()
        self._flush()

    def send(self, told: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._pipe.write(json.dumps(told) + "\n")
        except OSError:  # the runner has gone; stdin closes as well and ends the worker
            self._closed.set()

    def _tick(self) -> None:
        while not self._closed.wait(REPORT_SEC):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, Counts()
        if pending.answers or pending.rows:
            self._flushed_at = time.monotonic()
            self.send({"counts": asdict(pending)})


def main(args: Sequence[str]) -> int:
    from jobs.config import config_from_values
    from jobs.job import Job
    from jobs.worker import Worker

    progress = PipeProgress(int(args[0]))
    stop = StopRequest().install()
    values = json.loads(_read_line(0))
    stop.follow(0)
    try:
        worker = Worker(Job.open(config_from_values(values)), stop, progress, restarts=True)
        code = _work(worker, progress)
    except UserError as error:
        progress.note(str(error))
        code = EXIT_USER
    progress.close()
    return code


def _work(worker: Worker, progress: PipeProgress) -> int:
    from jobs.storage import StorageError
    from jobs.worker import WorkerFailed

    try:
        return EXIT_OK if worker.run() else EXIT_STOPPED
    except WorkerFailed:
        return EXIT_DIED
    except StorageError as error:
        progress.note(str(error))
        return EXIT_FAILED
    finally:
        progress.send({"result": worker.result()})


def _read_line(fd: int) -> bytes:
    """One line, not a byte more: what follows belongs to the thread that waits for the end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            raise SystemExit(EXIT_FAILED)
        line += byte
    return bytes(line)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # daemon threads and device contexts need no farewell
