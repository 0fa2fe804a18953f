"""Who may import whom: scripts, tests -> jobs -> pipeline -> pipeline.kernels, never back.

The command line must start without torch, which a fresh interpreter proves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.package.source_tree import ROOT, Source, packages, sources

HEAVY = ("torch", "transformers", "triton", "datasets")
FORBIDDEN = {
    "pipeline": ("jobs", "scripts", "tests"),
    "jobs": ("scripts", "tests", "torch", "triton", "transformers"),
    "scripts": ("tests",),
}
KERNELS_MAY_IMPORT = ("torch", "triton", "numpy", "PIL", "pipeline.errors", "pipeline.kernels")
# The child runs a command as the console script would and reports the heavy modules it loaded.
CHILD = """
import json, sys
from jobs.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
heavy = [name for name in {heavy!r} if name in sys.modules]
open({out!r}, "w").write(json.dumps({{"code": code, "heavy": heavy}}))
"""


def _is_in(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def test_direction() -> None:
    upward = [
        f"{s.name}:{i.line} imports {i.module}"
        for s in sources()
        for i in s.imports()
        if _is_in(i.module, FORBIDDEN.get(s.top, ()))
    ]
    assert not upward


def test_kernels_know_only_tensors() -> None:
    standard = tuple(sys.stdlib_module_names)
    wrong = [
        f"{s.name}:{i.line} imports {i.module}"
        for s in packages()
        if s.module.startswith("pipeline.kernels")
        for i in s.imports()
        if not _is_in(i.module, KERNELS_MAY_IMPORT + standard) and i.module != "pipeline"
    ]
    assert not wrong


def test_nobody_imports_the_command_line() -> None:
    # The command's own modules and processes are one thing with it; all else stands below.
    own = ("jobs.cli", "jobs.commands", "jobs.worker_process", "jobs.__main__")
    wrong = [
        f"{s.name}:{i.line}"
        for s in sources()
        if s.top != "tests" and not _is_in(s.module, own) and s.path.name != "write_docs.py"
        for i in s.imports()
        if _is_in(i.module, ("jobs.cli",))
    ]
    assert not wrong


@cache
def _by_module() -> dict[str, Source]:
    return {s.module: s for s in packages()}


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _loads(module: str) -> set[str]:
    """Modules of ours, and heavy ones, that importing `module` loads at once."""
    seen: set[str] = set()
    todo = _parents(module)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if source := _by_module().get(name):
            todo += [p for i in source.imports() if not i.lazy for p in _parents(i.module)]
    return seen & {*_by_module(), *HEAVY}


@pytest.mark.parametrize("module", sorted(m for m in _by_module() if m.startswith("jobs")))
def test_jobs_load_nothing_heavy(module: str) -> None:
    assert not _loads(module) & set(HEAVY)


def _run(tmp_path: Path, *arguments: str) -> dict[str, object]:
    out = tmp_path / "loaded.json"
    child = CHILD.format(heavy=HEAVY, out=str(out))
    command = [sys.executable, "-c", child, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.exists(), done.stderr
    return {**json.loads(out.read_text()), "stderr": done.stderr, "stdout": done.stdout}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("run", "--help"), 0),
        (("--version",), 0),
        (("schema",), 0),
        (("models",), 0),
        (("validate", "configs/demo.yaml", "--set", "output.path=/nowhere/at/all"), 0),
        (("status", "/nowhere/at/all"), 2),
        (("verify", "/nowhere/at/all"), 2),
        (("show", "/nowhere/at/all"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_command_starts_without_torch(
    arguments: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    ended = _run(tmp_path, *arguments)
    assert ended["heavy"] == []
    assert (ended["code"] or 0) == code, ended["stderr"]
