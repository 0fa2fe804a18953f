"""A worker in a process of its own: what `WorkerPool` starts, one a device.

Reads the config from its stdin, works until nothing is left or stdin closes, and reports JSON
lines on the pipe that its argument numbers. Not for people: they call `vlm-batch run`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs.cli import EXIT_FAILED, EXIT_USER
from jobs.progress import Counts
from jobs.signals import StopRequest
from pipeline.errors import UserError

REPORT_SEC = 0.5


class PipeProgress:
    """The worker's side of `Progress`: sends what it is told to the runner."""

    def __init__(self, fd: int) -> None:
        self._pipe = open(fd, "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        self._pending = Counts()
        self._closed = threading.Event()
        threading.Thread(target=self._tick, name="report", daemon=True).start()

    def add(self, counts: Counts) -> None:
        with self._lock:
            self._pending.add(counts)

    def stage(self, text: str) -> None:
        self.send({"stage": text})

    def note(self, text: str) -> None:
        self.send({"note": text})

    def committed_elsewhere(self, rows: int) -> None:
        self.send({"elsewhere": rows})

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
            self.send({"counts": asdict(pending)})


def main(args: Sequence[str]) -> int:
    from jobs.config import JobConfig
    from jobs.job import Job
    from jobs.worker import Worker

    progress = PipeProgress(int(args[0]))
    stop = StopRequest().install()
    text = _read_line(0)
    stop.follow(0)
    worker = None
    try:
        worker = Worker(Job.open(JobConfig.model_validate_json(text)), stop, progress)
        code = worker.run()
    except UserError as error:
        progress.note(str(error))
        code = EXIT_USER
    except Exception as error:  # noqa: BLE001 - the runner must hear of it; the traceback follows
        progress.note(f"{type(error).__name__}: {error}")
        progress.send({"result": {"error": f"{type(error).__name__}: {error}"}})
        sys.excepthook(*sys.exc_info())
        code = EXIT_FAILED
    if worker is not None:
        progress.close()
        progress.send({"result": worker.result()})
    return code


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
