"""`vlm-batch init`: a first config from questions or flags."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from jobs.commands.common import say
from pipeline.errors import UserError


@click.command()
@click.argument("config", default="job.yaml")
@click.option("--input", "path", metavar="PATH", help="Parquet files, folder, hub id.")
@click.option("--model", metavar="ID", help="Hub id, local folder, or demo.")
@click.option("--image", metavar="COLUMN", help="Image column.")
@click.option("--video", metavar="COLUMN", help="Video column.")
@click.option("--id", "id_column", metavar="COLUMN", help="Id column.")
@click.option("--prompt", "prompts", multiple=True, metavar="NAME=TEXT", help="May be repeated.")
@click.option("--output", metavar="PATH", help="Run folder.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(
    config: str, path: str | None, prompts: tuple[str, ...], force: bool, **flags: Any
) -> None:
    """Write a first config to CONFIG (default job.yaml): asks on a terminal, else takes flags."""
    from jobs.init import propose, render

    target = Path(config)
    if target.exists() and not force:
        raise UserError(f"{config} exists; give another name or --force.")
    asks = sys.stdin.isatty()
    if path is None:
        if not asks:
            raise UserError("Without a terminal to ask at, `init` needs --input PATH.")
        path = str(
            click.prompt(
                "Input (Parquet files, a folder of images or videos, or a hub id)", err=True
            )
        )
    proposal = propose(path)
    given = {
        "model": flags["model"],
        "image": flags["image"],
        "video": flags["video"],
        "id": flags["id_column"],
        "output": flags["output"],
    }
    for key, value in given.items():
        if value is None and asks and (key != "video" or proposal.video):
            value = _ask(key, getattr(proposal, key))
        if value is not None:
            setattr(proposal, key, value)
    proposal.prompts = _prompts(prompts, asks and not proposal.messages)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(proposal))
    click.echo(config)
    say(f"Next: vlm-batch validate {config}")


def _ask(key: str, default: str | None) -> str | None:
    question = {
        "model": "Model",
        "image": "Image column",
        "video": "Video column",
        "id": "Id column (empty: file and row number)",
        "output": "Run folder",
    }[key]
    return click.prompt(question, default=default or "", err=True) or None


def _prompts(given: tuple[str, ...], asks: bool) -> dict[str, str]:
    prompts = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name or not text:
            raise UserError(f"--prompt {item!r} is not NAME=TEXT, such as caption='Describe it.'")
        prompts[name] = text
    if not prompts and asks:
        text = click.prompt("Prompt", default="Describe this image in detail.", err=True)
        prompts["caption"] = text
    return prompts
