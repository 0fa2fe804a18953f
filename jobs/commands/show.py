"""`vlm-batch show`: rows, and what failed."""

from __future__ import annotations

import json
from typing import Any

import click

from jobs.commands.common import emit, json_option, table


@click.command()
@click.argument("path")
@click.option("-n", "--limit", type=click.IntRange(1), default=10, show_default=True)
@click.option("--status", type=click.Choice(["ok", "failed", "filtered"]))
@click.option("--code", metavar="CODE", help="Only rows with this error code.")
@click.option("--id", "row_id", metavar="ID", help="Only the row of this id.")
@click.option("--shard", metavar="SHARD", help="Only rows of this shard.")
@click.option("--failures", "count", is_flag=True, help="Count failed rows by error code.")
@json_option
def command(path: str, limit: int, count: bool, as_json: bool, **wanted: str | None) -> None:
    """Show committed rows of the run folder PATH; with --json one object a line."""
    if count:
        _show_failures(path, as_json)
        return
    from jobs.show import rows

    for row in rows(path, limit=limit, **wanted):
        click.echo(json.dumps(row, ensure_ascii=False, default=str) if as_json else _lines(row))


def _show_failures(path: str, as_json: bool) -> None:
    from jobs.show import failures

    found = failures(path)
    cells = [(f.code, f.count, f.error, ", ".join(f.row_ids)) for f in found]
    text = table(cells, ("code", "rows", "first error", "such as")) if cells else "no row failed"
    emit([vars(f) for f in found], text, as_json)


def _lines(row: dict[str, Any]) -> str:
    """`row_id  status`, then one indented line a column."""
    meta = row.pop("meta", None) or {}
    head = f"{row.pop('row_id')}  {row.pop('status')}"
    lines = [head]
    for name, value in row.items():
        if value is None:
            continue
        cut = "  (cut at max_new_tokens)" if _reason(meta, name) == "length" else ""
        lines.append(f"  {name}: {_text(value)}{cut}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _reason(meta: dict[str, Any], name: str) -> str | None:
    told = meta.get(name)
    return told.get("finish_reason") if told else None
