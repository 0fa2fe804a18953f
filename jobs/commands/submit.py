"""`vlm-batch submit`: the same job as a SLURM array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands.common import config_options, emit, json_option, read_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.config import JobConfig
    from jobs.slurm import Submission


@click.command()
@config_options
@click.option("--array", "tasks", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--sbatch", "options", multiple=True, metavar="OPTION", help="As --sbatch --partition=gpu."
)
@click.option("--warn", type=click.IntRange(20), default=60, help="Seconds before the time limit.")
@click.option("--stage-model", metavar="DIR", help="Copy the model to local disk DIR, once a node.")
@click.option("--export", "export_to", metavar="OUT", help="Export when every row is proved.")
@click.option("--dry-run", is_flag=True, help="Print the script; submit nothing.")
@json_option
def command(
    config: str,
    sets: tuple[str, ...],
    tasks: int,
    options: tuple[str, ...],
    warn: int,
    stage_model: str | None,
    export_to: str | None,
    dry_run: bool,
    as_json: bool,
    **short: str | None,
) -> None:
    """Submit CONFIG as a SLURM array: every task runs `vlm-batch run`, tasks share the shards.

    At the time limit a task journals and requeues itself while work is left. Behind all tasks one
    job runs `verify`, and `export` if asked.
    """
    from jobs.job import Inputs
    from jobs.slurm import Submission, check_options, script, submit

    job_config = read_config(config, sets, **short)
    check_options(options)
    task = Submission(
        config=_config_file(config),
        arguments=_arguments(sets, short),
        output=_run_folder(job_config),
        tasks=tasks,
        options=options,
        warn_sec=warn,
        model=_model_folder(job_config) if stage_model is not None else None,
        scratch=Path(stage_model or "/tmp"),
        export_to=Path(export_to).absolute() if export_to is not None else None,
    )
    if dry_run:
        text = script(task)
        emit({"script": text, "dry_run": True}, text.rstrip("\n"), as_json)
        return
    Inputs.open(job_config).check_run_folder()
    ids = submit(task)
    result = {"jobs": ids[:-1], "finish": ids[-1], "script": str(task.folder / "task.sbatch")}
    emit(result, _lines(task, ids), as_json)


def _lines(task: Submission, ids: list[str]) -> str:
    arrays = ", ".join(ids[:-1])
    return (
        f"submitted {task.tasks} tasks as {arrays} and {ids[-1]} to verify; script "
        f"{task.folder / 'task.sbatch'}; watch with: vlm-batch status {task.output}"
    )


def _config_file(config: str) -> Path:
    from jobs.config import find_config

    return find_config(config).absolute()


def _arguments(sets: tuple[str, ...], short: dict[str, str | None]) -> tuple[str, ...]:
    """The options of `run` that repeat what `submit` was given."""
    arguments = [part for value in sets for part in ("--set", value)]
    for name, value in short.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", value]
    return tuple(arguments)


def _run_folder(config: JobConfig) -> Path:
    if "://" in config.output.path:
        raise UserError(
            "submit writes its script and logs into the run folder, which must be a local folder "
            f"that all nodes see, not {config.output.path}."
        )
    return Path(config.output.path).absolute()


def _model_folder(config: JobConfig) -> Path:
    folder = Path(config.model.id).expanduser()
    if not folder.is_dir():
        raise UserError(f"--stage-model copies a local folder; model.id is {config.model.id}.")
    return folder.absolute()
