"""A shard at work here: its claim, its journal, and what earlier attempts have left of it.

Knows how an attempt begins; the worker drives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from jobs.attempt import Attempt
from jobs.commit import clean_private
from jobs.isolation import Suspicion, suspect
from jobs.job import Job
from jobs.journal import JournalWriter, read_journals
from jobs.redo import kept_answers
from jobs.shard_queue import Ticket
from jobs.storage import StorageError
from pipeline.rows import Row, ShardWork


@dataclass
class OpenShard:
    """A shard that this process has leased and opened."""

    ticket: Ticket
    attempt: Attempt
    journal: JournalWriter
    made_by: dict[tuple[int, str], str]  # attempt of each answer that was found
    suspicion: Suspicion | None  # set where earlier attempts have died of it

    @property
    def id(self) -> str:
        return self.ticket.shard.id

    def all_made_by(self) -> dict[tuple[int, str], str]:
        """The attempt of each answer."""
        ours = dict.fromkeys(self.attempt.answers, self.ticket.lease.attempt)
        return ours | self.made_by

    def work(self, only: Collection[int] | None = None) -> ShardWork:
        """What the labeller is asked for: all rows, or only some."""
        work = self.attempt.work(only)
        return replace(work, rows=self._noted(work.rows))

    def _noted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The labeller takes the rows: from here on a death may be theirs."""
        with contextlib.suppress(StorageError):  # the next answer finds it again
            self.journal.note(begun=True)
        yield from rows


def open_shard(
    job: Job,
    ticket: Ticket,
    read: Callable[[], Iterable[Row]],
    is_halted: Callable[[], bool],
) -> OpenShard:
    """Take up what earlier attempts have left. Raises: OSError, StorageError."""
    shard = ticket.shard
    state = read_journals(job.paths, shard.id, job.fingerprint, shard.revision)
    if state.attempts:
        clean_private(job.paths, shard.id)
    kept, kept_by = kept_answers(job.paths, job.plan, shard)
    attempt = Attempt(
        shard.id,
        shard.num_rows,
        job.config.prompt_names(),
        job.config.input.keep,
        read,
        kept | state.answers,
        is_halted,
    )
    journal = JournalWriter(
        job.paths,
        shard.id,
        ticket.lease.attempt,
        job.fingerprint,
        shard.revision,
        job.config.checkpoint.interval_sec,
    )
    suspicion = suspect(state, attempt.rows_left())
    return OpenShard(ticket, attempt, journal, kept_by | state.made_by, suspicion)
