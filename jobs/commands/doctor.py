"""`vlm-batch doctor`: is this machine fit for a run."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option, table


@click.command()
@json_option
def command(as_json: bool) -> int:
    """Look at the machine and say what a run would miss."""
    from jobs.doctor import examine, report

    checks = examine()
    result = report(checks)
    lines = table([(c.state, c.name, c.found, c.advice) for c in checks])
    emit(result, lines, as_json)
    return 1 if result["state"] == "bad" else 0
