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


_SCRIPT = """\
#!/bin/bash
{header}
# Written by `vlm-batch submit`. Every task runs the same command; tasks share the shards of
#   {output}
# so a task may die, and more tasks may be submitted, at any time.
set -u

# Compile caches of a task's own, on local disk: tasks cannot corrupt each other's.
scratch=${{SLURM_TMPDIR:-${{TMPDIR:-/tmp}}}}/vlm-batch-$SLURM_JOB_ID
mkdir -p "$scratch"
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
{stage}
# SLURM's warning comes to this shell; pass it on. scancel reaches every process by itself.
time_is_over= run=
trap 'time_is_over=1; [ -z "$run" ] || kill -USR1 "$run"' USR1
trap : TERM
{command} &
run=$!
[ -z "$time_is_over" ] || kill -USR1 "$run"
while :; do  # `wait` returns early when a trap has run
  wait "$run"; code=$?
  kill -0 "$run" 2>/dev/null || break
done
rm -rf "$scratch"

# 75: stopped early with work left. Only the time limit brings the task back, not scancel.
if [ "$code" = 75 ] && [ -n "$time_is_over" ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" && sleep 60
fi
exit "$code"
"""

_STAGE = """
# The model's files on local disk: the first task on a node copies them, the others wait.
node={scratch}/vlm-batch-models/{name}
mkdir -p "${{node%/*}}"
exec 9>"$node.lock"
flock 9
[ -e "$node.whole" ] || {{ rm -rf "$node"; cp -rL {model} "$node" && touch "$node.whole"; }}
exec 9>&-
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
        command += ' --model-path "$node"'
    return _SCRIPT.format(
        header=_header(task, f"{task.folder}/%A_%a.log", task.options, _control(task)),
        output=task.output,
        stage=stage,
        command=command,
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
    file, finish = task.folder / "task.sbatch", task.folder / "finish.sbatch"
    file.write_text(script(task))
    finish.write_text(finish_script(task))
    ids = []
    for size in array_sizes(task.tasks, max_array_size()):
        ids.append(_sbatch(f"--array=0-{size - 1}", str(file)))
    ids.append(_sbatch(f"--dependency=afterany:{':'.join(ids)}", str(finish)))
    return ids


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
