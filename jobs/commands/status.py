"""`vlm-batch status`: where a job stands."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option


@click.command()
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Show where the job of the run folder PATH stands: rows, shards, workers, rate."""
    from jobs.status import lines, read_status

    status = read_status(path)
    emit(status, lines(status), as_json)
