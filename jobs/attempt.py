"""One try at one shard: its rows as they are read, its answers as they come, until it is whole.

Knows the shard's journal; not how shards are found, and not how the table is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.rows import Answer, Row, ShardWork


class KeptRow(NamedTuple):
    """What the output needs of a row beside its answers."""

    row_id: str
    columns: tuple[Any, ...]


class Attempt:
    """Collects a shard's kept rows and answers. Rows and answers may come from two threads."""

    def __init__(
        self,
        shard: str,
        num_rows: int,
        prompts: Collection[str],
        keep: Collection[str],
        read: Callable[[], Iterable[Row]],
        answers: Mapping[tuple[int, str], Answer],
        is_halted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.shard = shard
        self.num_rows = num_rows
        self.prompts = tuple(prompts)
        self.keep = tuple(keep)
        self.num_resumed = len(answers)
        self._read = read
        self._is_halted = is_halted
        self._answers = dict(answers)
        self._kept: list[KeptRow] = []
        self._lock = threading.Lock()
        self._missing = self._count_missing()

    @property
    def num_expected(self) -> int:
        return self.num_rows * len(self.prompts)

    @property
    def is_complete(self) -> bool:
        return len(self._answers) == self.num_expected

    @property
    def num_rows_done(self) -> int:
        return self.num_rows - len(self._missing)

    @property
    def answers(self) -> dict[tuple[int, str], Answer]:
        return self._answers

    def rows_left(self) -> list[int]:
        """Rows that lack an answer."""
        return list(self._missing)

    def work(self, only: Collection[int] | None = None) -> ShardWork:
        """What the labeller is asked for: all rows, or only some."""
        rows = self._rows_until_halted()
        if only is not None:
            rows = self._portion(rows, frozenset(only))
        return ShardWork(self.shard, rows, frozenset(self._answers))

    def receive(self, answer: Answer) -> tuple[bool, bool]:
        """Take an answer; says whether it is new, and whether its row now has all answers."""
        key = (answer.key.row, answer.key.prompt)
        with self._lock:
            if key in self._answers:
                return False, False
            self._answers[key] = answer
            left = self._missing[answer.key.row] - 1
            self._missing[answer.key.row] = left
            if left == 0:
                del self._missing[answer.key.row]
            return True, left == 0

    def kept_rows(self) -> list[KeptRow]:
        """All rows, read again where the labeller did not need them."""
        if len(self._kept) < self.num_rows:
            for _ in self._rows():
                pass
        return self._kept

    def row_failed(self, row: int) -> bool:
        return any(self._answers[row, prompt].error_code for prompt in self.prompts)

    def _count_missing(self) -> dict[int, int]:
        missing = dict.fromkeys(range(self.num_rows), len(self.prompts))
        for row, _ in self._answers:
            missing[row] -= 1
        return {row: left for row, left in missing.items() if left}

    def _rows_until_halted(self) -> Iterator[Row]:
        """A run that stops needs no more rows, however many images they have."""
        for row in self._rows():
            if self._is_halted():
                return
            yield row

    @staticmethod
    def _portion(rows: Iterator[Row], only: frozenset[int]) -> Iterator[Row]:
        last = max(only)
        for row in rows:
            if row.index in only:
                yield row
            if row.index >= last:
                return

    def _rows(self) -> Iterator[Row]:
        kept: list[KeptRow] = []
        for row in self._read():
            kept.append(KeptRow(row.row_id, tuple(row.columns.get(name) for name in self.keep)))
            if len(kept) == self.num_rows:
                self._kept = kept
            yield row
        if len(kept) != self.num_rows:
            raise UserError(
                f"The input of {self.shard} gave {len(kept)} rows where the plan counted "
                f"{self.num_rows}: the file was changed while the job ran. Put it back, or start "
                "a new run folder."
            )
