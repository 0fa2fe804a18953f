"""`vlm-batch models`: which model families run fused, and under which template names."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands.common import emit, json_option, table


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the model families and their chat templates."""
    from pipeline.models.registry import list_families

    families = [_as_dict(family) for family in list_families()]
    header = tuple(families[0]) if families else ()
    rows = [tuple(_flat(value) for value in family.values()) for family in families]
    emit(families, table(rows, header), as_json)


def _as_dict(family: Any) -> dict[str, Any]:
    return dict(family) if isinstance(family, dict) else dict(vars(family))


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(sorted(map(str, value)))
    return value
