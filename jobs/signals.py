"""Asks a run to stop: signals, a lost parent, a deadline; and the hard exit when nobody listens.

A thread reads the signals from a pipe, so that a main thread deep in a kernel or in model loading
does not delay them. Knows nothing of shards: whoever listens registers a callback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early with work left, run it again
GRACE_SEC = 8.0  # below the 10 s that the design promises
SAME_SIGNAL_SEC = 0.5  # a batch system may signal the group and the process: one request
WARNING_ENV = "VLM_BATCH_WARNING_SEC"  # a batch script says how long after SIGUSR1 the end comes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """One request to stop, from wherever; listeners hear it once.

    `hard_exit` ends the process: on a second signal, or `GRACE_SEC` after the first one.
    """

    def __init__(self, grace_sec: float = GRACE_SEC) -> None:
        self.reason: str | None = None
        self.grace_sec = grace_sec
        self._event = threading.Event()
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._last_words: list[Callable[[], None]] = []
        self._restore: list[Callable[[], None]] = []
        self._requested_at = 0.0

    def __bool__(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float) -> bool:
        return self._event.wait(timeout)

    def on_request(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the signal thread when a stop is asked for; at once if it was."""
        with self._lock:
            self._listeners.append(listener)
            late = bool(self)
        if late:
            listener()

    def remove(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def before_hard_exit(self, last_word: Callable[[], None]) -> None:
        """Call `last_word` when the grace time is over and the process still runs."""
        self._last_words.append(last_word)

    def request(self, reason: str, grace_sec: float | None = None) -> None:
        """Ask for a stop; the process ends after the grace time, come what may."""
        with self._lock:
            if self:
                return
            self.reason = reason
            self.grace_sec = self.grace_sec if grace_sec is None else grace_sec
            self._requested_at = time.monotonic()
            self._event.set()
            listeners = list(self._listeners)
        threading.Thread(target=self._expire, name="stop-deadline", daemon=True).start()
        for listener in listeners:
            listener()

    def finish(self) -> None:
        """The run has ended by itself: no hard exit any more, signals as they were before."""
        self._finished.set()
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()

    def install(self) -> StopRequest:
        """Listen to SIGTERM, SIGINT and SIGUSR1. Call it in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._restore.append(lambda: self._close(reader, writer, old_fd))
        for number in SIGNALS:
            old = signal.signal(number, _ignore)
            self._restore.append(lambda number=number, old=old: _set_back(number, old))  # type: ignore[misc]
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def follow(self, fd: int) -> None:
        """Stop when the other end of the pipe `fd` closes: the parent has gone or asks for it.

        What it wrote before is the grace time in seconds.
        """
        thread = threading.Thread(target=self._follow, args=(fd,), name="parent", daemon=True)
        thread.start()

    def _follow(self, fd: int) -> None:
        told = b""
        with contextlib.suppress(OSError):
            while data := os.read(fd, 64):
                told += data
        self.request("its runner asked for it", float(told) if told else None)

    def _listen(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                self._received(number)

    def _received(self, number: int) -> None:
        if number not in SIGNALS:
            return
        if not self:
            self.request(signal.Signals(number).name, _warning_sec(number))
        elif time.monotonic() - self._requested_at > SAME_SIGNAL_SEC:
            os._exit(EXIT_STOPPED)

    def _expire(self) -> None:
        if self._finished.wait(self.grace_sec):
            return
        saviour = threading.Thread(target=self._say_last_words, daemon=True)
        saviour.start()
        saviour.join(1.0)
        os._exit(EXIT_STOPPED)

    def _say_last_words(self) -> None:
        for last_word in self._last_words:
            with contextlib.suppress(OSError):
                last_word()

    @staticmethod
    def _close(reader: socket.socket, writer: socket.socket, old_fd: int) -> None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(old_fd)
        writer.close()
        reader.close()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python needs a handler of its own, or the wake-up pipe stays silent."""


def _warning_sec(number: int) -> float | None:
    """A warning leaves more time than a demand, if whoever sends it has said so."""
    told = os.environ.get(WARNING_ENV) if number == signal.SIGUSR1 else None
    return float(told) if told else None


def _set_back(number: signal.Signals, old: object) -> None:
    with contextlib.suppress(ValueError, TypeError):
        signal.signal(number, old)  # type: ignore[arg-type]
