"""The run folder's log of what happened, one JSON line an event, for reports and rates.

Best effort: nothing is decided by it, and a failure to write it is no failure of the run. Object
stores cannot be appended to; there the log is not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from jobs.paths import RunPaths


class Events:
    """Appends to `events.jsonl`; lines of several processes do not mix."""

    def __init__(self, paths: RunPaths) -> None:
        self._path = paths.local(paths.events)
        self._who = f"{socket.gethostname()}:{os.getpid()}"

    def write(self, kind: str, **values: Any) -> None:
        if self._path is None:
            return
        event = {"time": round(time.time(), 3), "kind": kind, "worker": self._who, **values}
        line = json.dumps(event, ensure_ascii=True) + "\n"
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)


def read_events(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """All events that can be read, oldest first."""
    path = paths.local(paths.events)
    if path is None or not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)
