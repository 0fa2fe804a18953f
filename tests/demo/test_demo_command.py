"""What `make demo` runs: a job on the model that ships, and where its answers and report lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = """#!/bin/sh
case "$1" in run) set -- "$@" --set input.limit=4 ;; esac
exec {python} -m jobs.cli "$@"
"""


def test_it_says_where_the_answers_and_the_report_lie(tmp_path: Path, root: Path) -> None:
    program = tmp_path / "bin/vlm-batch"
    program.parent.mkdir()
    program.write_text(COMMAND.format(python=sys.executable))
    program.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", root / "scripts/demo.sh", program.parent, out],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = [Path(line.split()[-1]) for line in done.stdout.splitlines() if str(out) in line][-2:]
    assert named == [out / "data", out / "report.html"]
    assert list(named[0].glob("*.parquet"))
    assert "<html" in named[1].read_text()
