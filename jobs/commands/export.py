"""`vlm-batch export`: one dataset out of a run folder."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option


@click.command()
@click.argument("path")
@click.argument("out")
@click.option("--status", type=click.Choice(["ok", "failed", "filtered"]), help="Only these rows.")
@click.option("--no-meta", is_flag=True, help="Leave the column `meta` out.")
@click.option("--partial", is_flag=True, help="Export what is there although work is left.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
def command(
    path: str,
    out: str,
    status: str | None,
    no_meta: bool,
    partial: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the run folder PATH as one dataset: OUT.parquet, OUT.jsonl, or the folder OUT.

    A folder holds a dataset card and data/train-*.parquet: `datasets.load_dataset(OUT)` reads it.
    """
    from jobs.export import Selection, export

    result = export(path, out, Selection(status, not no_meta, partial), force=force)
    counts = ", ".join(f"{count} {state}" for state, count in result["states"].items() if count)
    emit(result, f"{out}: {result['rows']} rows ({counts})", as_json)
