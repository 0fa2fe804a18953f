"""Units that run a job again for new rows: cron, scrontab and a systemd timer, as text.

Runs may overlap: they share the run folder. Knows no scheduler's state.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

KINDS = ("cron", "scrontab", "systemd")
UNIT_FOLDER = "~/.config/systemd/user"
_CRON = {"hourly": "0 * * * *", "daily": "0 3 * * *", "weekly": "0 3 * * 1"}
_CALENDAR = {"hourly": "hourly", "daily": "*-*-* 03:00:00", "weekly": "Mon *-*-* 03:00:00"}
_EVERY = re.compile(r"(\d+)(min|h)")


@dataclass(frozen=True)
class Schedule:
    """One job, how often it runs and where its log goes."""

    config: Path
    every: str
    log: Path
    arguments: tuple[str, ...] = ()  # of `vlm-batch run`, behind the config

    @property
    def name(self) -> str:
        return "vlm-batch-" + re.sub(r"[^A-Za-z0-9._-]", "-", self.config.stem)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", "run", str(self.config), *self.arguments]


def units(schedule: Schedule, kind: str, options: Sequence[str] = ()) -> str:
    """The text of one kind of unit; `options` are sbatch's, for scrontab. Raises: UserError."""
    _check(schedule)
    if kind == "cron":
        return _crontab(schedule)
    if kind == "scrontab":
        return _scrontab(schedule, options)
    parts = (f"# {UNIT_FOLDER}/{name}\n{text}\n" for name, text in systemd_units(schedule).items())
    return "".join(parts) + f"# systemctl --user enable --now {schedule.name}.timer\n"


def systemd_units(schedule: Schedule) -> dict[str, str]:
    """Texts of a service and its timer by file name. Raises: UserError."""
    what = f"vlm-batch: answer the new rows of {schedule.config.name}".replace("%", "%%")
    service = f"""[Unit]
Description={what}

[Service]
Type=oneshot
WorkingDirectory={_specifiers(str(Path.cwd()))}
ExecStart={" ".join(map(_systemd_quote, schedule.command))}
StandardOutput=append:{_specifiers(str(schedule.log))}
StandardError=append:{_specifiers(str(schedule.log))}
# 75: stopped early with work left; the next run goes on.
SuccessExitStatus=75
TimeoutStopSec=15
"""
    timer = f"""[Unit]
Description={what}, {schedule.every}

[Timer]
OnCalendar={_calendar(schedule.every)}
Persistent=true

[Install]
WantedBy=timers.target
"""
    return {f"{schedule.name}.service": service, f"{schedule.name}.timer": timer}


def _crontab(schedule: Schedule) -> str:
    log = shlex.quote(str(schedule.log))
    line = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(schedule.command)} >>{log} 2>&1"
    line = line.replace("%", "\\%")  # NOTE: a bare % ends a crontab's command.
    return f"# crontab -e\n{_cron(schedule.every)} {line}\n"


def _scrontab(schedule: Schedule, options: Sequence[str]) -> str:
    log = str(schedule.log).replace("%", "%%")
    told = [
        f"--job-name={schedule.name}",
        f"--chdir={Path.cwd()}",
        f"--output={log}",
        "--open-mode=append",
        *options,
    ]
    lines = "".join(f"#SCRON {_scron_quote(option)}\n" for option in told)
    return f"# scrontab -e\n{lines}{_cron(schedule.every)} {shlex.join(schedule.command)}\n"


def _scron_quote(option: str) -> str:
    """An option as sbatch reads it: blanks stand in double quotes."""
    key, equals, value = option.partition("=")
    return f'{key}{equals}"{value}"' if re.search(r"\s|[;'\\]", value) else option


def _systemd_quote(argument: str) -> str:
    """An argument of ExecStart: nothing of it is expanded."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return '"' + _specifiers(escaped) + '"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _check(schedule: Schedule) -> None:
    texts = (str(schedule.config), str(schedule.log), str(Path.cwd()), *schedule.arguments)
    if any("\n" in text or "\r" in text for text in texts):
        raise UserError("a schedule's paths and options cannot hold line breaks.")
    _cron(schedule.every)


def _cron(every: str) -> str:
    """Five fields of a crontab for `hourly`, `daily`, `weekly`, `15min` or `6h`."""
    if every in _CRON:
        return _CRON[every]
    count, unit = _interval(every)
    return f"*/{count} * * * *" if unit == "min" else f"0 */{count} * * *"


def _calendar(every: str) -> str:
    """The same as a systemd calendar expression, which a machine that slept catches up on."""
    if every in _CALENDAR:
        return _CALENDAR[every]
    count, unit = _interval(every)
    return f"*-*-* *:00/{count}:00" if unit == "min" else f"*-*-* 00/{count}:00:00"


def _interval(every: str) -> tuple[int, str]:
    match = _EVERY.fullmatch(every)
    count = int(match[1]) if match else 0
    whole = {"min": 60, "h": 24}
    if not match or not count or whole[match[2]] % count:
        raise UserError(
            f"--every {every}: write {', '.join(_CRON)}, minutes that divide an hour such as "
            "15min, or hours that divide a day such as 6h."
        )
    return count, match[2]
