"""Runs a job on this host: one worker in this process, or one process a device, until the end.

Knows exit codes and progress; shards are the workers' business. Any number of runners may share a
run folder.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

from jobs.config import JobConfig
from jobs.events import Events
from jobs.exits import EXIT_FAILED, EXIT_OK, EXIT_USER
from jobs.job import Job
from jobs.pool import Member, WorkerPool, environments, visible_devices
from jobs.progress import Progress
from jobs.signals import EXIT_STOPPED, StopRequest
from jobs.storage import StorageError
from jobs.tidy import tidy
from jobs.witness import witness_death
from jobs.worker import Worker, WorkerFailed


@dataclass(frozen=True)
class Options:
    """How to run, which changes no answer."""

    workers: int | None = None  # None: one a visible device, else one in this process
    changed: str = "refuse"
    stop_after_sec: float | None = None
    watchdog_sec: float | None = None  # None: as the config says
    new_version: bool = False
    idle_code: int = EXIT_OK  # where no row was left to do


@dataclass
class Outcome:
    """How a run ended."""

    code: int
    message: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # of the run folder


def run_job(config: JobConfig, options: Options) -> Outcome:
    """Run until every row has its state, or a stop is asked for. Raises: UserError."""
    stop = StopRequest().install()
    timer = _start_timer(stop, options.stop_after_sec)
    try:
        job = Job.open(config, changed=options.changed, new_version=options.new_version)
        left = job.num_rows_left()
        if not left:
            tidy(job.paths, job.plan)
            told = "nothing to do: every row has its state"
            return Outcome(options.idle_code, told, {"rows": 0}, job.paths.root)
        progress = Progress(job.plan.num_rows, job.plan.num_rows - left)
        Events(job.paths).write("start", rows_left=left)
        stop.before_hard_exit(lambda: progress.note(_stopped(stop)))
        try:
            outcome = _run(job, options, stop, progress)
        finally:
            progress.close()
        outcome.path = job.paths.root
        outcome.summary = progress.summary() | outcome.summary
        Events(job.paths).write("end", code=outcome.code, **outcome.summary)
        return outcome
    finally:
        if timer is not None:
            timer.cancel()
        stop.finish()


def _run(job: Job, options: Options, stop: StopRequest, progress: Progress) -> Outcome:
    workers = options.workers
    if workers is None and job.config.engine.device in ("auto", "cuda"):
        workers = len(visible_devices()) or None
    if workers is None:
        outcome = _run_here(job, stop, progress)
    else:
        outcome = _run_pool(job, workers, options, stop, progress)
    if outcome.code == EXIT_OK and (left := job.num_rows_left()):
        told = f"{left} rows have no state: see `vlm-batch verify {job.paths.root}`"
        return Outcome(EXIT_FAILED, told, outcome.summary)
    if outcome.code == EXIT_OK:
        tidy(job.paths, job.plan)
    return outcome


def _run_here(job: Job, stop: StopRequest, progress: Progress) -> Outcome:
    worker = Worker(job, stop, progress)
    try:
        done = worker.run()
        outcome = Outcome(EXIT_OK) if done else Outcome(EXIT_STOPPED, _stopped(stop))
    except (WorkerFailed, StorageError) as error:
        outcome = Outcome(EXIT_FAILED, str(error))
    outcome.summary = {"workers": [worker.result()]}
    return outcome


def _run_pool(
    job: Job, workers: int, options: Options, stop: StopRequest, progress: Progress
) -> Outcome:
    pool = WorkerPool(
        _as_line(job.config),
        environments(workers, job.config.engine.device),
        stop,
        progress,
        attempts=job.config.retry.attempts,
        watchdog_sec=options.watchdog_sec or job.config.retry.watchdog_sec,
        on_death=lambda pid: witness_death(job.paths, pid),
    )
    members = pool.run()
    outcome = _outcome_of(members, stop, job.num_rows_left())
    outcome.summary = {"workers": [member.result for member in members]}
    return outcome


def _outcome_of(members: list[Member], stop: StopRequest, rows_left: int) -> Outcome:
    codes = {member.code for member in members}
    if EXIT_USER in codes:
        return Outcome(EXIT_USER, "the workers refused the job")
    if not rows_left:
        return Outcome(EXIT_OK)
    if stop:
        return Outcome(EXIT_STOPPED, _stopped(stop))
    return Outcome(EXIT_FAILED, f"{rows_left} rows have no state: every worker has given up")


def _stopped(stop: StopRequest) -> str:
    return f"stopped early ({stop.reason}) with work left: run the same command again"


def _as_line(config: JobConfig) -> str:
    """One line that `config_from_values` reads; what came from the environment stays there."""
    return json.dumps(config.resolved())


def _start_timer(stop: StopRequest, seconds: float | None) -> threading.Timer | None:
    if seconds is None:
        return None
    timer = threading.Timer(seconds, stop.request, args=("its time is over",))
    timer.daemon = True
    timer.start()
    return timer
