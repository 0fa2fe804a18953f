"""The README's first example is true: its commands print what is printed there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FIRST_SCREEN_LINES = 62


def _block(kind: str) -> str:
    match = re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    assert match
    return match[1]


def _commands() -> list[tuple[list[str], str]]:
    """(arguments, what is printed below) of each command of the first console block."""
    parts = re.split(r"^\$ vlm-batch ", _block("console"), flags=re.MULTILINE)[1:]
    return [
        (shlex.split(command), printed)
        for command, _, printed in (part.partition("\n") for part in parts)
    ]


def test_the_example_prints_what_it_says(tmp_path: Path) -> None:
    config = _block("yaml")
    (tmp_path / config.split()[1]).write_text(config)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for arguments, printed in _commands():
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == printed, arguments


def test_the_first_screen_is_short() -> None:
    assert README[: README.index("## Install")].count("\n") <= FIRST_SCREEN_LINES
