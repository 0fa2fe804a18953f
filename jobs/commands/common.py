"""What several commands share: the CONFIG argument with its options, and how results are printed.

stdout carries results only; everything else goes to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jobs.config import JobConfig

F = Callable[..., Any]

SHORT_KEYS = {
    "model_path": "model.id",
    "chat_template": "model.chat_template",
    "output": "output.path",
}


def config_options(command: F) -> F:
    """CONFIG, --set, and the short forms of keys that launch lines of model servers use."""
    decorators = (
        click.argument("config"),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a config key."
        ),
        click.option("--model-path", metavar="ID", help="Short for --set model.id=ID."),
        click.option("--chat-template", metavar="NAME", help="Short for model.chat_template."),
        click.option("--output", metavar="PATH", help="Short for output.path."),
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def read_config(config: str, sets: tuple[str, ...], **short: str | None) -> JobConfig:
    """Load CONFIG; `short` holds the values of the short options by their Python names."""
    from jobs.config import load_config

    given = {SHORT_KEYS[name]: value for name, value in short.items() if value is not None}
    return load_config(config, [*sets, *(f"{key}={value}" for key, value in given.items())])


def emit(result: Any, text: str, as_json: bool) -> None:
    """Print a report: JSON for programs, `text` for people."""
    click.echo(json.dumps(result, indent=2, default=str, ensure_ascii=False) if as_json else text)


def say(text: str) -> None:
    """A line for the person who watches: stderr."""
    click.echo(text, err=True)


def table(rows: list[tuple[Any, ...]], header: tuple[str, ...] = ()) -> str:
    """Columns aligned by spaces; numbers to the right."""
    cells = [tuple(_cell(value) for value in row) for row in rows]
    if header:
        cells.insert(0, header)
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return "" if value is None else str(value)
