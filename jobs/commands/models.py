"""`vlm-batch models`: model families, their templates and inputs, and the memory they need."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands.common import emit, json_option, table

NEEDED = (
    "weights: on the device, in bfloat16 or with model.quantization fp8; needed: the least card,"
    " with room\nfor a cache of 8,192 tokens. `vlm-batch plan CONFIG` counts the job's own model"
    " and rows."
)


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the model families: chat templates, inputs, and the memory that their examples need."""
    from pipeline.models.registry import list_families

    families = [_as_dict(family) for family in list_families()]
    header = tuple(families[0]) if families else ()
    rows = [tuple(_flat(value) for value in family.values()) for family in families]
    emit(families, f"{table(rows, header)}\n\n{NEEDED}", as_json)


def _as_dict(family: Any) -> dict[str, Any]:
    return dict(family) if isinstance(family, dict) else dict(vars(family))


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(sorted(map(str, value)))
    return value
