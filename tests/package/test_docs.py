"""The Markdown files tell the truth: tables, links, commands, targets, and the sizes promised."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest

from jobs.cli import COMMANDS, group
from pipeline.errors import CODES

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".venv", ".git", ".whl", ".vllm", "out", "node_modules")


def _markdown() -> list[Path]:
    found = ROOT.rglob("*.md")
    return sorted(p for p in found if not set(p.relative_to(ROOT).parts) & set(SKIPPED))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", _markdown(), ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert not [link for link in local if not (path.parent / link).exists()]


def test_generated_tables_are_current() -> None:
    command = [sys.executable, "scripts/write_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _code_lines(path: Path) -> list[str]:
    """Lines of code blocks, fenced or indented, and inline code."""
    text = path.read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for block in re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL):
        lines += [line.strip() for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", text)


@cache
def _command(name: str) -> click.Command | None:
    return group.get_command(click.Context(group), name)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line.split("#")[0].removeprefix("$ "))
    except ValueError:
        return []


def _uses(path: Path) -> list[tuple[str, list[str]]]:
    """(subcommand, its other words) of each `vlm-batch …` in the file's code."""
    found = []
    for line in _code_lines(path):
        words = _words(line)
        if "vlm-batch" in words and (rest := words[words.index("vlm-batch") + 1 :]):
            found.append((rest[0], rest[1:]))
    return found


@pytest.mark.parametrize("path", _markdown(), ids=_name)
def test_commands_and_options_exist(path: Path) -> None:
    wrong = []
    for name, words in _uses(path):
        if name.startswith("-") or not re.fullmatch(r"[a-z]+", name):
            continue
        if name not in COMMANDS:
            wrong.append(name)
            continue
        command = _command(name)
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        wrong += [f"{name} {option}" for option in options - known]
    assert not wrong


@pytest.mark.parametrize("path", _markdown(), ids=_name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set()
    for line in _code_lines(path):
        words = _words(line)
        if words[:1] == ["make"]:
            used |= {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)}
    assert used <= targets


@pytest.mark.parametrize("path", _markdown(), ids=_name)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(r"`((?:configs|scripts|tests|pipeline|jobs)/[\w./-]+)`", path.read_text())
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_readme_first_screen_is_short() -> None:
    before_second_heading = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)[0]
    assert before_second_heading.count("\n") <= 60


def test_readme_names_every_error_code() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [code for code in CODES if f"`{code}`" not in text]


def test_changelog_opens_with_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].strip("[]") == "Unreleased"
