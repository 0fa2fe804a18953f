"""`vlm-batch retry`: failed rows once more."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option


@click.command()
@click.argument("path")
@click.option("--code", "codes", multiple=True, metavar="CODE", help="Only this error code.")
@click.option("--dry-run", is_flag=True, help="Say what would be done again.")
@json_option
def command(path: str, codes: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Give failed rows of the run folder PATH back; the next run answers them once more.

    Rows that are ok keep their answers.
    """
    from jobs.retry import retry

    found = retry(path, codes, dry_run=dry_run)
    result = {"shards": found.shards, "answers": dict(found.answers), "planned": not dry_run}
    counts = ", ".join(f"{count} {code}" for code, count in found.answers.most_common())
    then = "" if dry_run or not found.shards else "; run the job again to do them"
    shards = f"{len(found.shards)} shard{'s' * (len(found.shards) != 1)}"
    text = f"{counts} in {shards}{then}" if found.shards else "nothing failed so"
    emit(result, text, as_json)
