"""Units that run a job again for new rows: cron, scrontab and a systemd timer, as text.

Runs may overlap: they share the run folder. Knows no scheduler's state.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from pipeline.errors import UserError

KINDS = ("cron", "scrontab", "systemd")
_CALENDARS = {
    "hourly": "0 * * * *",
    "daily": "0 3 * * *",
    "weekly": "0 3 * * 1",
}
_EVERY = re.compile(r"(\d+)(min|h)")


def units(config: Path, kind: str, every: str, log: Path, options: tuple[str, ...] = ()) -> str:
    """The text of one kind of unit. Raises: UserError."""
    cron = _cron(every)
    command = shlex.join([sys.executable, "-m", "jobs.cli", "run", str(config)])
    if kind == "cron":
        # NOTE: a bare % ends a crontab's command.
        safe = f"cd {shlex.quote(str(Path.cwd()))} && {command} >>{shlex.quote(str(log))} 2>&1"
        return f"# crontab -e\n{cron} {safe}\n".replace("%", "\\%")
    if kind == "scrontab":
        scron = "".join(f"#SCRON {option}\n" for option in options)
        return (
            f"# scrontab -e\n#SCRON --job-name=vlm-batch-{_name(config)}\n"
            f"#SCRON --chdir={Path.cwd()}\n#SCRON --output={log}\n#SCRON --open-mode=append\n"
            f"{scron}{cron} {command}\n"
        )
    return _systemd(config, command, every)


def _systemd(config: Path, command: str, every: str) -> str:
    name = _name(config)
    calendar = every if every in _CALENDARS else None
    timer = f"OnCalendar={calendar}" if calendar else f"OnUnitActiveSec={every}\nOnBootSec=5min"
    return f"""# ~/.config/systemd/user/vlm-batch-{name}.service
[Unit]
Description=vlm-batch {name}

[Service]
Type=oneshot
WorkingDirectory={str(Path.cwd()).replace("%", "%%")}
ExecStart={command.replace("%", "%%")}
# 75: stopped early with work left; the timer runs it again.
SuccessExitStatus=75
TimeoutStopSec=15

# ~/.config/systemd/user/vlm-batch-{name}.timer
[Unit]
Description=vlm-batch {name}, {every}

[Timer]
{timer}
Persistent=true

[Install]
WantedBy=timers.target

# systemctl --user enable --now vlm-batch-{name}.timer
"""


def _cron(every: str) -> str:
    """Five fields of a crontab for `hourly`, `daily`, `weekly`, `15min` or `6h`."""
    if every in _CALENDARS:
        return _CALENDARS[every]
    match = _EVERY.fullmatch(every)
    count = int(match[1]) if match else 0
    if match and match[2] == "min" and count and 60 % count == 0:
        return f"*/{count} * * * *"
    if match and match[2] == "h" and count and 24 % count == 0:
        return f"0 */{count} * * *"
    raise UserError(
        f"--every {every}: write {', '.join(_CALENDARS)}, minutes that divide an hour such as "
        "15min, or hours that divide a day such as 6h."
    )


def _name(config: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", config.stem)
