"""`vlm-batch verify`: proof that every row has its state, or what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.commands.common import emit, json_option

if TYPE_CHECKING:
    from jobs.verify import Verdict


@click.command()
@click.argument("path")
@click.option("--repair", "repairs", is_flag=True, help="Give the shards of bad parts back.")
@click.option("--no-input", is_flag=True, help="Do not look at the input files.")
@json_option
def command(path: str, repairs: bool, no_input: bool, as_json: bool) -> int:
    """Prove the run folder PATH: every row in exactly one state, every file as it was committed.

    Exit codes: 0 whole; 1 something is damaged; 75 nothing is damaged and work is left.
    """
    from jobs.signals import EXIT_STOPPED
    from jobs.verify import repair, verify

    verdict = verify(path, look_at_input=not no_input)
    if repairs and verdict.findings:
        verdict = repair(path, verdict)
    emit(verdict.as_dict(), _lines(verdict), as_json)
    if verdict.findings:
        return 1
    return EXIT_STOPPED if verdict.rows_left else 0


def _lines(verdict: Verdict) -> str:
    states = ", ".join(f"{count} {state}" for state, count in sorted(verdict.states.items()))
    lines = [
        f"{verdict.path}: {sum(verdict.states.values())} of {verdict.rows_planned} planned rows "
        f"proved ({states or 'none'}), {verdict.rows_left} left"
    ]
    if verdict.rows_input is not None:
        lines.append(f"the input has {verdict.rows_input} rows")
    lines += verdict.notes
    lines += [f"{f.file}: {f.problem}. {f.advice}" for f in verdict.findings]
    if verdict.repaired:
        lines.append(f"given back to be done again: {', '.join(verdict.repaired)}")
    elif verdict.is_whole:
        lines.append("whole: every row has exactly one state")
    return "\n".join(lines)
