"""`vlm-batch schedule`: run a job again for new rows."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.commands.common import emit, json_option, read_config


@click.command()
@click.argument("config")
@click.option(
    "--kind", type=click.Choice(["cron", "scrontab", "systemd"]), default="cron", show_default=True
)
@click.option(
    "--every", default="hourly", show_default=True, help="hourly, daily, weekly, 15min, 6h."
)
@click.option("--log", default="vlm-batch.log", show_default=True, help="Log file.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="For scrontab.")
@json_option
def command(
    config: str, kind: str, every: str, log: str, options: tuple[str, ...], as_json: bool
) -> None:
    """Print units that run CONFIG again for new rows; rows that are done are not touched.

    Overlapping runs are harmless: they share the run folder.
    """
    from jobs.config import find_config
    from jobs.schedule import units

    read_config(config, ())
    text = units(find_config(config).absolute(), kind, every, Path(log).absolute(), options)
    emit({"kind": kind, "every": every, "text": text}, text.rstrip("\n"), as_json)
