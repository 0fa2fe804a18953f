"""Finding the row that kills: what journals of dead attempts lead to, by simulation."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from jobs.isolation import CRASHED, MAX_ALONE_UNSEEN, MAX_BARREN, MAX_DEATHS, suspect
from jobs.journal import JournalState
from pipeline.errors import RowError
from pipeline.rows import Answer, RequestKey

PROMPT = "caption"


def _answer(row: int) -> Answer:
    return Answer(RequestKey("s", row, PROMPT), "text", "stop", 1, 1, 1)


class Shard:
    """A shard of rows, some deadly, tried by one process after the other."""

    def __init__(self, num_rows: int, deadly: Collection[int]) -> None:
        self.state = JournalState()
        self.left = set(range(num_rows))
        self.deadly = frozenset(deadly)
        self.num_deaths = 0
        self.device_works = True  # on rows of elsewhere
        self.has_runner = True

    def attempt(self) -> None:
        """One process: the whole shard, or in portions once it is suspected."""
        name = f"a{len(self.state.attempts):04d}"
        self.state.attempts.append(name)
        suspicion = suspect(self.state, self.left)
        self._note(name, begun=True)
        if suspicion is None:
            self._label(name, sorted(self.left))
            return
        for row in suspicion.crashed:
            self._take(name, Answer.failed(RequestKey("s", row, PROMPT), RowError(CRASHED)))
        proved = False
        for portion in suspicion.portions:
            proved |= suspicion.is_dubious(portion) and self.device_works
            self._note(name, trying=list(portion), proved=proved)
            if not self._label(name, portion):
                return
            proved = True
            self._note(name, tried=list(portion))

    def _label(self, name: str, rows: Collection[int]) -> bool:
        """A batch dies as a whole."""
        if self.deadly & set(rows):
            self.num_deaths += 1
            if self.has_runner:
                self.state.died.add(name)
            return False
        for row in rows:
            self._take(name, _answer(row))
        return True

    def _take(self, name: str, answer: Answer) -> None:
        self.state.answers[answer.key.row, PROMPT] = answer
        self.state.made_by[answer.key.row, PROMPT] = name
        self.left.discard(answer.key.row)

    def _note(self, name: str, **note: object) -> None:
        self.state.notes.append((name, note))

    def crashed(self) -> set[int]:
        return {row for (row, _), a in self.state.answers.items() if a.error_code == CRASHED}


@pytest.mark.parametrize(
    ("num_rows", "num_deadly"), [(1, 0), (40, 1), (40, 3), (4096, 1), (300, 5)]
)
def test_exactly_the_deadly_rows_are_given_up(num_rows: int, num_deadly: int) -> None:
    rng = random.Random(num_rows)
    shard = Shard(num_rows, rng.sample(range(num_rows), num_deadly))
    for _ in range(100):
        if not shard.left:
            break
        shard.attempt()
    assert not shard.left
    assert shard.crashed() == shard.deadly
    assert shard.num_deaths <= MAX_BARREN + 6 * num_deadly


def test_deaths_that_no_runner_saw_accuse_late() -> None:
    """A preempted run leaves the same journal as one that its row brought down."""
    shard = Shard(10, [3])
    shard.has_runner = False
    for _ in range(MAX_BARREN + 1 + MAX_ALONE_UNSEEN - 1):
        shard.attempt()
        assert shard.left
    shard.attempt()
    assert shard.crashed() == {3}
    assert not shard.left


def test_a_dead_device_gives_no_row_up() -> None:
    """Where nothing succeeds anywhere, the rows are not to blame."""
    shard = Shard(20, range(20))
    shard.device_works = False
    for _ in range(100):
        shard.attempt()
    assert len(shard.left) == 20


def test_many_deaths_with_answers_between_are_suspicious_too() -> None:
    state = JournalState()
    for number in range(MAX_DEATHS):
        name = f"a{number}"
        assert suspect(state, range(10)) is None
        state.attempts.append(name)
        state.notes.append((name, {"begun": True}))
        state.answers[number, PROMPT], state.made_by[number, PROMPT] = _answer(number), name
    suspicion = suspect(state, range(MAX_DEATHS, 10))
    assert suspicion is not None
    assert sorted(row for rows in suspicion.portions for row in rows) == list(range(4, 10))


def test_attempts_that_ended_by_themselves_accuse_nobody() -> None:
    state = JournalState(attempts=["a", "b", "c"])
    for name, ending in (("a", "stopped"), ("b", "hard exit"), ("c", "stopped")):
        state.notes += [(name, {"begun": True}), (name, {"end": ending})]
    assert suspect(state, range(5)) is None


def test_attempts_that_died_before_they_had_rows_accuse_nobody() -> None:
    assert suspect(JournalState(attempts=["a", "b", "c"]), range(5)) is None
