"""`vlm-batch schedule`: run a job again for new rows."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.commands.common import config_options, emit, json_option, read_config


@click.command()
@config_options
@click.option(
    "--kind", type=click.Choice(["cron", "scrontab", "systemd"]), default="cron", show_default=True
)
@click.option(
    "--every", default="hourly", show_default=True, help="hourly, daily, weekly, 15min, 6h."
)
@click.option("--log", default="vlm-batch.log", show_default=True, help="Log file.")
@click.option(
    "--changed", type=click.Choice(["refuse", "redo"]), help="As for `run`: changed input files."
)
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="For scrontab.")
@json_option
def command(
    config: str,
    sets: tuple[str, ...],
    kind: str,
    every: str,
    log: str,
    changed: str | None,
    options: tuple[str, ...],
    as_json: bool,
    **short: str | None,
) -> None:
    """Print units that run CONFIG again for new rows; rows that are done are not touched.

    Overlapping runs are harmless: they share the run folder.
    """
    from jobs.config import find_config
    from jobs.schedule import Schedule, units

    read_config(config, sets, **short)
    given = {**short, "changed": changed}
    arguments = [part for text in sets for part in ("--set", text)]
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", value]
    schedule = Schedule(
        find_config(config).absolute(), every, Path(log).absolute(), tuple(arguments)
    )
    text = units(schedule, kind, options)
    emit({"kind": kind, "every": every, "text": text}, text.rstrip("\n"), as_json)
