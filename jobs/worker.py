"""One worker: takes shards by lease, has their rows labelled, journals the answers, commits.

The one file of `jobs/` that starts the pipeline, inside a function. Knows one device; other
workers it meets only in the run folder.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, Protocol

from jobs.commit import commit_shard
from jobs.events import Events
from jobs.job import Job
from jobs.journal import delete_journals
from jobs.labellers import labeller_class
from jobs.leases import Leases
from jobs.open_shard import OpenShard, open_shard
from jobs.portions import Hands, label_in_portions
from jobs.progress import Counts
from jobs.shard_queue import ShardQueue, Ticket
from jobs.signals import StopRequest
from jobs.storage import StorageError
from jobs.table import build_table
from pipeline.errors import EngineError, UserError
from pipeline.rows import Answer, Row, ShardWork

log = logging.getLogger(__name__)
FIRST_WAIT_SEC = 0.2
MAX_WAIT_SEC = 10.0


class Reporter(Protocol):
    """Who is told of progress."""

    def add(self, counts: Counts) -> None: ...
    def found(self, rows: int) -> None: ...
    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def alive(self) -> None: ...


class WorkerFailed(Exception):
    """The worker cannot go on; the message is for the person who runs it."""


class Worker:
    """Works until no shard is left or a stop is asked for.

    `restarts` true: an attempt's failure ends the worker, because a fresh process will follow.
    """

    def __init__(
        self, job: Job, stop: StopRequest, progress: Reporter, *, restarts: bool = False
    ) -> None:
        self.job = job
        self.stop = stop
        self.progress = progress
        self.restarts = restarts
        self.leases = Leases(job.paths, job.config.checkpoint.lease_sec)
        self.queue = ShardQueue(job.paths, job.plan, self.leases)
        self.events = Events(job.paths)
        self.counts = Counts()
        self.num_committed = 0
        self.given_up: dict[str, str] = {}  # shards with the reason
        self._open: dict[str, OpenShard] = {}
        self._suspected: list[OpenShard] = []
        self._lock = threading.RLock()
        self._labeller: Any = None
        self._stats: dict[str, Any] = {}
        self._failures: Counter[str] = Counter()  # of each shard, without progress between
        self._failures_in_a_row = 0
        self._num_good = 0  # answers of this process that were no failures
        self._pull_error: Exception | None = None
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commits: list[Future[None]] = []

    def run(self) -> bool:
        """Work; True when every shard is committed, False when stopped before.

        Raises: UserError, StorageError, WorkerFailed.
        """
        self.stop.on_request(self._drain)
        self.stop.before_hard_exit(self._let_go)
        wait_sec = FIRST_WAIT_SEC
        try:
            while not self.stop:
                works = self._works()
                first = next(works, None)
                if first is not None:
                    self._label(chain([first], works))
                had_work = first is not None or bool(self._suspected)
                while self._suspected:
                    suspected = self._suspected.pop()
                    self.progress.note(f"{suspected.id}: workers have died of it: in portions now")
                    label_in_portions(self._hands(), suspected)
                self._finish_commits()
                if had_work:
                    wait_sec = FIRST_WAIT_SEC
                elif self._is_over():
                    break
                else:
                    self.progress.stage("waiting for shards that other workers hold")
                    self.stop.wait(wait_sec)
                    wait_sec = min(wait_sec * 1.5, MAX_WAIT_SEC, self.leases.ttl_sec / 4)
        finally:
            self._close()
        if self.given_up:
            shard, reason = next(iter(self.given_up.items()))
            more = f" and {len(self.given_up) - 1} more" if len(self.given_up) > 1 else ""
            raise WorkerFailed(f"{shard}{more} given up: {reason}")
        return self.queue.num_listings > 0 and self.queue.num_left == 0

    def result(self) -> dict[str, Any]:
        """For reports: what was done here, and where the time went."""
        return {
            **vars(self.counts),
            "shards": self.num_committed,
            "given_up": dict(self.given_up),
            "labeller": self._stats,
        }

    # Taking shards: runs in whichever thread the labeller pulls from.

    def _works(self) -> Iterator[ShardWork]:
        while not self.stop:
            try:
                shard = self._take()
            except OSError as error:
                self._pull_error = StorageError(f"taking a shard failed: {error}")
                raise self._pull_error from error
            except (StorageError, UserError) as error:
                self._pull_error = error
                raise
            if shard is None:
                return
            if shard.attempt.is_complete:
                self._submit(shard)
            elif shard.suspicion is not None:
                self._suspected.append(shard)  # its turn comes when nothing else is under way
                return
            else:
                yield shard.work()

    def _take(self) -> OpenShard | None:
        with self._lock:
            ticket = self.queue.take()
        return None if ticket is None else self._begin(ticket)

    def _begin(self, ticket: Ticket) -> OpenShard:
        shard = open_shard(self.job, ticket, lambda: self._read(ticket), lambda: bool(self.stop))
        with self._lock:
            self._open[shard.id] = shard
        self.progress.found(shard.attempt.num_rows_done)
        found = len(shard.attempt.answers)
        self.events.write("take", shard=shard.id, attempt=ticket.lease.attempt, found=found)
        return shard

    def _read(self, ticket: Ticket) -> Iterator[Row]:
        shard = ticket.shard
        try:
            yield from self.job.source.read(shard.path, shard.start, shard.stop)
        except Exception as error:
            self._pull_error = error
            if isinstance(error, UserError):
                self._void(shard.id)
            raise

    def _void(self, shard: str) -> None:
        """The shard's rows are not those that were planned: what was answered must not count."""
        with self._lock, contextlib.suppress(StorageError, KeyError):
            self._open[shard].journal.note(void=True)

    # Labelling: the main thread.

    def _label(self, works: Iterator[ShardWork]) -> None:
        try:
            labeller = self._get_labeller()
            if self.stop:
                return
            for answer in labeller.label(works):
                self._receive(answer)
            if self._misses_answers() and not self.stop:
                raise EngineError("the labeller ended before all its answers were there")
        except Exception as error:  # noqa: BLE001 - a broken device raises whatever it likes
            # NOTE: what went wrong where the labeller pulled may reach us in another coat.
            cause, self._pull_error = self._pull_error or error, None
            if isinstance(cause, UserError | StorageError):
                raise cause from None
            self._attempt_failed(cause)

    def _get_labeller(self) -> Any:
        if self._labeller is None:
            self.progress.stage("loading the model")
            labeller = labeller_class()(self.job.config.label_settings())
            with self._lock:
                self._labeller = labeller
            self.progress.stage("waiting for the first answers")
        return self._labeller

    def _receive(self, answer: Answer) -> None:
        self._num_good += answer.error_code is None
        with self._lock:
            shard = self._open.get(answer.key.shard)
        if shard is None:
            return
        if shard.ticket.lease.lost:
            self._lose(shard)
            return
        is_new, row_is_done = shard.attempt.receive(answer)
        if not is_new:
            return
        shard.journal.append(answer)
        self._failures_in_a_row = 0
        failed = row_is_done and shard.attempt.row_failed(answer.key.row)
        counts = Counts(
            int(row_is_done), int(failed), 1, answer.num_prompt_tokens, answer.num_output_tokens
        )
        self.counts.add(counts)
        self.progress.add(counts)
        if shard.attempt.is_complete:
            self._submit(shard)
        self._raise_commit_errors()

    def _misses_answers(self) -> bool:
        with self._lock:
            opened = [shard for shard in self._open.values() if shard.suspicion is None]
        return any(not shard.attempt.is_complete for shard in opened)

    def _hands(self) -> Hands:
        return Hands(
            self.job,
            label=lambda work: self._label(iter([work])),
            take=self._receive,
            goes_on=lambda shard: not self.stop and shard.id in self._open,
            has_proved=lambda: self._num_good > 0,
            narrowed=self._narrowed,
        )

    def _narrowed(self, shard: OpenShard) -> None:
        self._failures[shard.id] = self._failures_in_a_row = 0
        self.progress.alive()

    def _lose(self, shard: OpenShard) -> None:
        """Another worker has taken the shard over: leave it the work."""
        log.warning("%s: lost to another worker", shard.ticket.shard.id)
        self._forget(shard)
        shard.journal.abandon()
        self.progress.found(-shard.attempt.num_rows_done)
        self.leases.release(shard.ticket.lease)

    # Committing: a thread of its own, so that the device does not wait for the disk.

    def _submit(self, shard: OpenShard) -> None:
        with self._lock:
            self._commits.append(self._committer.submit(self._commit, shard))

    def _commit(self, shard: OpenShard) -> None:
        job, ticket = self.job, shard.ticket
        rows = shard.attempt.kept_rows()
        table = build_table(job.schema, rows, shard.attempt.answers, shard.all_made_by())
        won = commit_shard(
            job.paths,
            ticket.shard,
            table,
            attempt=ticket.lease.attempt,
            fingerprint=job.fingerprint,
            compression=job.config.output.compression,
        )
        self._forget(shard)
        shard.journal.abandon()
        delete_journals(job.paths, ticket.shard.id, ticket.shard.revision)
        self.leases.release(ticket.lease)
        with self._lock:
            self.queue.done(ticket.shard.id)
        self.num_committed += won
        self.events.write(
            "commit", shard=ticket.shard.id, attempt=ticket.lease.attempt, won=won,
            rows=ticket.shard.num_rows,
        )  # fmt: skip

    def _forget(self, shard: OpenShard) -> None:
        with self._lock:
            self._open.pop(shard.ticket.shard.id, None)

    def _finish_commits(self) -> None:
        with self._lock:
            waiting, self._commits = self._commits, []
        for future in waiting:
            future.result()

    def _raise_commit_errors(self) -> None:
        with self._lock:
            ended = [future for future in self._commits if future.done()]
            self._commits = [future for future in self._commits if not future.done()]
        for future in ended:
            future.result()

    # Trouble and the end.

    def _attempt_failed(self, error: Exception) -> None:
        """Give the open shards back, and decide whether to try again."""
        if not isinstance(error, EngineError | OSError | MemoryError):
            log.warning("an error that no part of the pipeline expects", exc_info=error)
        self.progress.note(f"attempt failed: {_describe(error)}")
        with contextlib.suppress(Exception):  # the shards it concerns are given back below
            self._finish_commits()
        self._failures_in_a_row += 1
        attempts = self.job.config.retry.attempts
        with self._lock:
            for name, opened in self._open.items():
                made_progress = opened.journal.num_appended > 0
                self._failures[name] = 1 if made_progress else self._failures[name] + 1
            gone = {shard for shard in self._open if self._failures[shard] >= attempts}
        self.given_up |= dict.fromkeys(gone, _describe(error))
        for shard in self._release_all(f"failed: {_describe(error)}", keep_leases=gone):
            self.events.write("fail", shard=shard, error=_describe(error))
            if shard not in gone:
                self.queue.put_back(shard)
        self._close_labeller()
        if self.restarts or self._failures_in_a_row >= attempts:
            raise WorkerFailed(_describe(error)) from error

    def _is_over(self) -> bool:
        return self.queue.num_left <= len(self.given_up)

    def _release_all(self, ending: str, keep_leases: Collection[str] = ()) -> list[str]:
        """Sync and close all journals, release the leases; returns the shards.

        A lease kept until the worker ends keeps the worker itself from taking the shard again.
        """
        with self._lock:
            shards = list(self._open.values())
            self._open.clear()
        for shard in shards:
            self.progress.found(-shard.attempt.num_rows_done)
            try:
                shard.journal.note(end=ending)
                shard.journal.close()
            finally:
                if shard.ticket.shard.id not in keep_leases:
                    self.leases.release(shard.ticket.lease)
        return [shard.ticket.shard.id for shard in shards]

    def _drain(self) -> None:
        self.progress.note(f"stopping: {self.stop.reason}")
        with self._lock:
            labeller = self._labeller
        if labeller is not None:
            labeller.drain()

    def _let_go(self) -> None:
        """Just before the hard exit: what is finished is synced, the shards are free."""
        self._release_all("hard exit")

    def _close(self) -> None:
        self.stop.remove(self._drain)
        try:
            self._finish_commits()
        finally:
            self._committer.shutdown()
            try:
                self._release_all("stopped")
            finally:
                self.leases.close()
                self._close_labeller()

    def _close_labeller(self) -> None:
        with self._lock:
            labeller, self._labeller = self._labeller, None
        if labeller is not None:
            self._stats = labeller.stats()
            labeller.close()


def _describe(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, EngineError | UserError) else f"{type(error).__name__}: {text}"
