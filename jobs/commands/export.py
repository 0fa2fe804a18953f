"""`vlm-batch export`: one dataset out of a run folder."""

from __future__ import annotations

import click

from jobs.commands.common import emit, json_option
from pipeline.errors import UserError


@click.command()
@click.argument("path")
@click.argument("out", required=False)
@click.option("--to", metavar="ADDRESS", help="OUT on the hub: hf://datasets/OWNER/NAME[@BRANCH].")
@click.option(
    "--join",
    "joins",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Answers of another run folder of the same input, as further columns.",
)
@click.option("--status", type=click.Choice(["ok", "failed", "filtered"]), help="Only these rows.")
@click.option("--no-meta", is_flag=True, help="Leave the column `meta` out.")
@click.option("--partial", is_flag=True, help="Export what is there although work is left.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--private", is_flag=True, help="Make a new repository of the hub private.")
@json_option
def command(
    path: str,
    out: str | None,
    to: str | None,
    joins: tuple[str, ...],
    status: str | None,
    no_meta: bool,
    partial: bool,
    force: bool,
    private: bool,
    as_json: bool,
) -> None:
    """Write the run folder PATH as one dataset: OUT.parquet, OUT.jsonl, or the folder OUT.

    A folder holds a dataset card and data/train-*.parquet: `datasets.load_dataset(OUT)` reads it.
    OUT may be an address of an object store, or a dataset of the Hugging Face hub.
    """
    from jobs.export import Selection, export

    if (out is None) == (to is None):
        raise UserError("export needs one place to write to: OUT, or --to hf://datasets/….")
    selection = Selection(status, not no_meta, partial, joins)
    result = export(path, out or to or "", selection, force=force, private=private)
    counts = ", ".join(f"{count} {state}" for state, count in result["states"].items() if count)
    emit(result, f"{result['out']}: {result['rows']} rows ({counts})", as_json)
