"""`vlm-batch schema`: the config's JSON schema, for editors."""

from __future__ import annotations

import json

import click


@click.command()
def command() -> None:
    """Print the JSON schema of the config, for editors and checks."""
    from jobs.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
