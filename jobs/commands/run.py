"""`vlm-batch run`: the main job; the same command again resumes."""

from __future__ import annotations

import logging
from typing import Any

import click

from jobs.commands.common import config_options, emit, json_option, read_config, say


@click.command()
@config_options
@click.option("--workers", type=click.IntRange(1), help="Worker processes; default one a GPU.")
@click.option(
    "--changed",
    type=click.Choice(["refuse", "redo"]),
    default="refuse",
    show_default=True,
    help="What to do about input files that changed since they were planned.",
)
@click.option(
    "--new-version",
    is_flag=True,
    help="Where output.path holds answers of other settings, work in output.path/v2, v3 …",
)
@click.option(
    "--idle-code",
    type=click.IntRange(0, 255),
    default=0,
    show_default=True,
    metavar="CODE",
    help="Exit code where no row was left to do.",
)
@click.option("--stop-after", type=float, metavar="SEC", help="Stop early, as on a signal.")
@click.option("--watchdog", type=float, metavar="SEC", help="Restart a worker silent for as long.")
@json_option
def command(
    config: str,
    sets: tuple[str, ...],
    workers: int | None,
    changed: str,
    new_version: bool,
    idle_code: int,
    stop_after: float | None,
    watchdog: float | None,
    as_json: bool,
    **short: str | None,
) -> int:
    """Answer every row of CONFIG's input; run it again to resume.

    Stops at SIGTERM, SIGINT or SIGUSR1 within 10 s with exit code 75. Several runs may share a run
    folder.
    """
    from jobs.runner import Options, run_job
    from jobs.status import brief, read_status

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    job_config = read_config(config, sets, **short)
    options = Options(workers, changed, stop_after, watchdog, new_version, idle_code)
    outcome = run_job(job_config, options)
    if outcome.message:
        say(outcome.message)
    status = read_status(outcome.path)
    result: dict[str, Any] = {"exit_code": outcome.code, "run": outcome.summary, "status": status}
    emit(result, brief(status), as_json)
    return outcome.code
