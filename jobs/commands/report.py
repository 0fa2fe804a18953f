"""`vlm-batch report`: a page about a run folder."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option


@click.command()
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Write report.html into the run folder PATH: counts, tokens, time, failures, first rows."""
    from jobs.paths import RunPaths
    from jobs.report.numbers import collect
    from jobs.report.page import render

    numbers = collect(path)
    paths = RunPaths(path)
    paths.storage.replace(paths.report, render(numbers).encode())
    emit(numbers, paths.url(paths.report), as_json)
