"""The `vlm-batch` command: a table of subcommands, loaded when they are called; exit codes.

Knows no command's work: each stands in `jobs/commands/`. Imports no torch. Also callable as
`python -m jobs.cli`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jobs.exits import EXIT_FAILED, EXIT_OK, EXIT_USER
from jobs.storage import StorageError
from pipeline.errors import UserError

# The order is that of a job's life; every name is a module of jobs.commands with a `command`.
COMMANDS = (
    "init",
    "validate",
    "plan",
    "run",
    "submit",
    "schedule",
    "status",
    "verify",
    "retry",
    "show",
    "export",
    "report",
    "models",
    "doctor",
    "schema",
)


class NobodyReads(Exception):
    """stdout was closed; click would make exit code 1 of it."""


class LazyGroup(click.Group):
    """Imports a subcommand's module when the subcommand is asked for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise NobodyReads from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"jobs.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand:
            raise UserError(_unknown_command(args[0])) from None


def _unknown_command(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(COMMANDS)}."
    return f"`{name}` is no command of vlm-batch; {hint}"


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"vlm-batch {version('vlm-batch')}")
    except PackageNotFoundError:
        click.echo("vlm-batch (not installed)")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True)
def group() -> None:
    """Run a vision-language model over a table of images, exactly once per row.

    \b
    Exit codes: 0 every row has its state; 1 failed; 2 a mistake in the command or
    the config; 75 stopped early with work left: run it again.
    """


def check_neighbour() -> None:
    """Refuse to work with a `pipeline` package that was not installed beside `jobs`."""
    spec = importlib.util.find_spec("pipeline")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    ours = Path(__file__).resolve().parent.parent
    if not any(Path(folder).resolve().parent == ours for folder in folders):
        found = folders[0] if folders else "nowhere"
        raise UserError(
            f"The Python package `pipeline` was found at {found}, not beside {ours / 'jobs'}: "
            "another package of that name hides it; remove it or use a fresh environment."
        )


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one sentence on stderr."""
    try:
        check_neighbour()
        code = group.main(args=args, prog_name="vlm-batch", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except UserError as error:
        return _complain(str(error), EXIT_USER)
    except StorageError as error:
        return _complain(str(error), EXIT_FAILED)
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return _complain(error.format_message() + where, EXIT_USER)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", EXIT_FAILED)
    except (NobodyReads, BrokenPipeError):  # `vlm-batch show … | head`
        # NOTE: the interpreter flushes once more at its end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        return _complain(f"{error.strerror or error}{where}", EXIT_FAILED)


def _complain(sentence: str, code: int) -> int:
    click.echo(f"vlm-batch: {sentence}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
