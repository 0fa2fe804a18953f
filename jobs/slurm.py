"""SLURM: a readable batch script of which every array task runs the same `vlm-batch run`.

Tasks share shards by leases, so their number may change between submissions and any may die. Knows
sbatch and scontrol by their commands; nothing in a run depends on this file.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.signals import WARNING_ENV
from jobs.slurm_tasks import remember
from pipeline.errors import UserError

_FORBIDDEN = ("--array", "-a", "--requeue", "--no-requeue", "--open-mode", "--signal")
_ID = re.compile(r"Submitted batch job (\d+)")


@dataclass(frozen=True)
class Submission:
    """What is to be submitted."""

    config: Path
    arguments: tuple[str, ...]  # of `run`, behind the config
    output: Path  # the run folder
    tasks: int
    options: tuple[str, ...] = ()  # of sbatch, verbatim
    warn_sec: int = 60  # between the warning and the time limit
    model: Path | None = None  # a local folder to copy to `scratch` once a node
    scratch: Path = Path("/tmp")  # local disk of a node
    export_to: Path | None = None

    @property
    def folder(self) -> Path:
        return self.output / "slurm"

    @property
    def file(self) -> Path:
        """The tasks' script; every node reads it here."""
        return self.folder / "task.sbatch"


_SCRIPT = """\
#!/bin/bash
{header}
# Written by `vlm-batch submit`. Every task runs the same command; tasks share the shards of
#   {output}
# so a task may die, and more tasks may be submitted, at any time.
set -u
scratch=${{SLURM_TMPDIR:-${{TMPDIR:-/tmp}}}}/vlm-batch-$SLURM_JOB_ID

# What each task of the job does: `vlm-batch run` starts one worker for every GPU that it sees.
if [ "${{1-}}" = step ]; then
  # Compile caches of a task's own, on local disk: tasks cannot corrupt each other's.
  mkdir -p "$scratch"
  export TRITON_CACHE_DIR="$scratch/triton-${{SLURM_PROCID:-0}}"
  export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor-${{SLURM_PROCID:-0}}"
  export {warning_env}={grace_sec}  # what is in flight at the warning has as long to end
{stage}
  exec {command}
fi

# SLURM's warning comes to this shell; pass it on. scancel reaches every process by itself.
time_is_over= run=
trap 'time_is_over=1; [ -z "$run" ] || kill -USR1 "$run"' USR1
trap : TERM
everywhere=
[ "${{SLURM_NTASKS:-1}}" -gt 1 ] && everywhere="srun --kill-on-bad-exit=0"
$everywhere bash {file} step &
run=$!
[ -z "$time_is_over" ] || kill -USR1 "$run"
while :; do  # `wait` returns early when a trap has run
  wait "$run"; code=$?
  kill -0 "$run" 2>/dev/null || break
done
${{everywhere:+srun --ntasks-per-node=1}} rm -rf "$scratch"

# 75: stopped early with work left; 138: warned before it could listen. Only the time limit brings
# the task back, not scancel.
if [ -n "$time_is_over" ] && {{ [ "$code" = 75 ] || [ "$code" = 138 ]; }}; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" && sleep 60
fi
exit "$code"
"""

_STAGE = """
  # The model's files on local disk: the first task on a node copies them, the others wait.
  model={model} copy={scratch}/vlm-batch-models/{name}
  if mkdir -p "${{copy%/*}}" && exec 9>"$copy.lock" && flock 9; then
    [ -e "$copy.whole" ] || {{ rm -rf "$copy"; cp -rL "$model" "$copy" && touch "$copy.whole"; }}
    exec 9>&-
    [ -e "$copy.whole" ] && model=$copy || rm -rf "$copy"  # no room: read it where it is
  fi
"""

_FINISH = """\
#!/bin/bash
{header}
# Written by `vlm-batch submit`: proves the results once all tasks have ended{and_exports}.
{verify} || exit
{export}
"""


def script(task: Submission) -> str:
    """The tasks' batch script, without `--array`, which the command line gives."""
    arguments = [*task.arguments]
    stage = ""
    command = _python("run", str(task.config), *arguments)
    if task.model is not None:
        stage = _STAGE.format(
            scratch=shlex.quote(str(task.scratch)),
            name=shlex.quote(_copy_name(task.model)),
            model=shlex.quote(str(task.model)),
        )
        command += ' --model-path "$model"'
    return _SCRIPT.format(
        header=_header(task, f"{task.folder}/%A_%a.log", task.options, _control(task)),
        output=task.output,
        stage=stage,
        command=command,
        file=shlex.quote(str(task.file)),
        warning_env=WARNING_ENV,
        grace_sec=max(5, task.warn_sec - 20),
    )


def finish_script(task: Submission) -> str:
    """The script of the one job that runs behind all tasks."""
    export = "exit"
    if task.export_to is not None:
        export = _python("export", str(task.output), str(task.export_to), "--force")
    return _FINISH.format(
        header=_header(task, f"{task.folder}/finish-%j.log", _plain(task.options), ()),
        and_exports=" and exports them" if task.export_to is not None else "",
        verify=_python("verify", str(task.output)),
        export=export,
    )


def submit(task: Submission) -> list[str]:
    """Write the scripts into the run folder and submit them; returns the job ids, last the one
    that verifies. Raises: UserError with sbatch's own words.
    """
    check_options(task.options)
    task.folder.mkdir(parents=True, exist_ok=True)
    finish = task.folder / "finish.sbatch"
    _write(task.file, script(task))
    _write(finish, finish_script(task))
    ids = []
    for size in array_sizes(task.tasks, max_array_size()):
        ids.append(_sbatch(f"--array=0-{size - 1}", str(task.file)))
        remember(task.folder, ids[-1], size)
    ids.append(_sbatch(f"--dependency=afterany:{':'.join(ids)}", str(finish)))
    remember(task.folder, ids[-1], 0)
    return ids


def _write(file: Path, text: str) -> None:
    """Whole at every moment: a task that is requeued may be reading the old one."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def array_sizes(tasks: int, limit: int) -> list[int]:
    """Tasks are alike, so an array larger than the cluster allows is simply several."""
    whole, rest = divmod(tasks, limit)
    return [limit] * whole + ([rest] if rest else [])


def max_array_size() -> int:
    """Tasks that one array may have; a guess where scontrol does not tell."""
    try:
        told = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 1001
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", told)
    return max(1, int(match[1])) if match else 1001


def check_options(options: Sequence[str]) -> None:
    """Raises: UserError for options that the script sets itself."""
    for option in options:
        name = option.split("=", 1)[0].split(" ", 1)[0]
        if not option.startswith("-"):
            raise UserError(f"--sbatch {option!r}: write an option of sbatch, as --partition=gpu.")
        if name in _FORBIDDEN:
            raise UserError(f"--sbatch {name}: the script sets this itself.")


def _copy_name(model: Path) -> str:
    """Another name for another folder, and for the same folder with other files."""
    files = sorted((path.name, path.stat().st_mtime_ns) for path in model.iterdir())
    digest = hashlib.blake2b(repr((str(model), files)).encode(), digest_size=6)
    return f"{model.name}-{digest.hexdigest()}"


def _control(task: Submission) -> tuple[str, ...]:
    return (f"--signal=B:USR1@{task.warn_sec}", "--requeue", "--open-mode=append")


def _header(task: Submission, log: str, options: Sequence[str], control: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", task.output.name)
    lines = [f"--job-name=vlm-batch-{name}", f"--output={_escaped(log)}", *control, *options]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _escaped(log: str) -> str:
    """sbatch splits a header line at blanks unless they are quoted."""
    return f'"{log}"' if re.search(r"\s", log) else log


def _plain(options: Sequence[str]) -> list[str]:
    """Options that say where a job may run; verifying needs no GPU."""
    names = ("--partition", "-p", "--account", "-A", "--qos", "--chdir", "-D", "--mem")
    return [option for option in options if option.split("=", 1)[0].split(" ", 1)[0] in names]


def _python(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "jobs.cli", *arguments])


def _sbatch(*arguments: str) -> str:
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("There is no sbatch here: submit from a login node.") from error
    match = _ID.search(done.stdout)
    if done.returncode or match is None:
        raise UserError(f"sbatch refused: {(done.stderr or done.stdout).strip()}")
    return match[1]
