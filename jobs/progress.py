"""Shows a run's progress on stderr: a tqdm bar on a terminal, a log line every few seconds else.

Counts what it is told; knows no shards and no files.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, TextIO

WINDOW_SEC = 60.0  # rates are those of the last minute
LOG_INTERVAL_SEC = 5.0


@dataclass
class Counts:
    """What was done: sums that workers report and the runner adds up."""

    rows: int = 0
    failed: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Progress:
    """Rows done of `total_rows`; `done_rows` were done before this run."""

    def __init__(self, total_rows: int, done_rows: int = 0, stream: TextIO | None = None) -> None:
        self.total_rows = total_rows
        self.done_before = done_rows
        self.counts = Counts()
        self._stage = "starting"
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._closed = threading.Event()
        self._bar: Any = self._open_bar() if self._stream.isatty() else None
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._thread.start()

    @property
    def done_rows(self) -> int:
        return min(self.total_rows, self.done_before + self.counts.rows)

    def add(self, counts: Counts) -> None:
        with self._lock:
            self.counts.add(counts)

    def stage(self, text: str) -> None:
        """Say what goes on while no rows come: `loading the model`."""
        self._stage = text

    def note(self, text: str) -> None:
        """Print one line beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def alive(self) -> None:
        """A sign of life without a count: nothing to show."""

    def found(self, rows: int) -> None:
        """`rows` more were done by others; below 0, were counted and must be found again."""
        with self._lock:
            self.done_before += rows

    def rates(self) -> tuple[float, float]:
        """Rows and output tokens a second over the last minute."""
        with self._lock:
            now = time.monotonic()
            self._samples.append((now, self.counts.rows, self.counts.output_tokens))
            while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_SEC:
                self._samples.popleft()
            began, rows, tokens = self._samples[0]
            seconds = max(now - began, 1e-3)
            return (self.counts.rows - rows) / seconds, (
                self.counts.output_tokens - tokens
            ) / seconds

    def summary(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._began
        return {
            "seconds": round(seconds, 3),
            "rows": self.counts.rows,
            "failed": self.counts.failed,
            "answers": self.counts.answers,
            "prompt_tokens": self.counts.prompt_tokens,
            "output_tokens": self.counts.output_tokens,
            "rows_per_sec": round(self.counts.rows / max(seconds, 1e-3), 3),
        }

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if self._bar is not None:
            self._draw()
            self._bar.close()

    def _open_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.total_rows,
            initial=self.done_before,
            unit="row",
            file=self._stream,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _tick(self) -> None:
        wait_sec = 0.5 if self._bar is not None else LOG_INTERVAL_SEC
        while not self._closed.wait(wait_sec):
            if self._bar is not None:
                self._draw()
            else:
                self.note(self.line())

    def _draw(self) -> None:
        _, tokens = self.rates()
        self._bar.n = self.done_rows
        self._bar.set_postfix_str(f"{tokens:.0f} tok/s, {self.counts.failed} failed", refresh=True)

    def line(self) -> str:
        rows_rate, token_rate = self.rates()
        if not self.counts.answers:
            return f"{self._stage} ({time.monotonic() - self._began:.0f} s)"
        left = self.total_rows - self.done_rows
        eta = format_seconds(left / rows_rate) if rows_rate > 0 else "unknown"
        return (
            f"{self.done_rows}/{self.total_rows} rows, {rows_rate:.1f} rows/s, "
            f"{token_rate:.0f} tokens/s, {self.counts.failed} failed, {eta} left"
        )


def format_seconds(seconds: float) -> str:
    """`47 s`, `3 min`, `5.2 h`, `4.1 days`: one figure that a person can use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
