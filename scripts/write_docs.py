"""Rewrites what is made from the code in the Markdown files, and the plot made from results.jsonl.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`. `make docs` rewrites them;
the tests run this with --check and fail where a table no longer tells the truth.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILES = ("README.md", "CONTRIBUTING.md", "pipeline/README.md", "jobs/README.md")
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if outdated")
    check = parser.parse_args().check
    outdated = [name for name in FILES if rewrite(ROOT / name, check)]
    outdated += [name for name, draw in PICTURES.items() if redraw(ROOT / name, draw(), check)]
    if outdated and check:
        print(f"Outdated, run `make docs`: {', '.join(outdated)}", file=sys.stderr)
    return 1 if outdated and check else 0


def rewrite(path: Path, check: bool = False) -> bool:
    """Write the file's tables anew; True if that changes it."""
    old = path.read_text()
    new = BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", old)
    if new != old and not check:
        path.write_text(new)
    return new != old


def redraw(path: Path, new: str, check: bool = False) -> bool:
    """Write the picture anew; True if that changes it."""
    changed = not path.exists() or path.read_text() != new
    if changed and not check:
        path.write_text(new)
    return changed


def measured() -> str:
    from scripts.bench import report

    return report.measured()


def benchmark() -> str:
    from scripts.bench import report

    return report.table()


def plot() -> str:
    from scripts.bench import plot

    return plot.svg()


def codes() -> str:
    from pipeline.errors import CODES

    return _table(("`error_code`", "meaning"), [(f"`{c}`", text) for c, text in CODES.items()])


def commands() -> str:
    from jobs.cli import group

    context = click.Context(group)
    rows = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        usage = " ".join([name, *command.collect_usage_pieces(click.Context(command))[1:]])
        rows.append((f"`vlm-batch {usage}`", command.get_short_help_str(200)))
    return _table(("command", "what it does"), rows)


def config() -> str:
    from jobs.config import JobConfig

    rows = [
        (f"`{name}`", f"`{default}`" if default else "", text)
        for name, default, text in _keys(JobConfig, "")
    ]
    return _table(("key", "default", "meaning"), rows)


def pipeline_files() -> str:
    return _files("pipeline")


def jobs_files() -> str:
    return _files("jobs")


TABLES: dict[str, Callable[[], str]] = {
    "codes": codes,
    "commands": commands,
    "config": config,
    "pipeline_files": pipeline_files,
    "jobs_files": jobs_files,
    "measured": measured,
    "benchmark": benchmark,
}
PICTURES: dict[str, Callable[[], str]] = {"scripts/bench/results.svg": plot}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)


def _keys(model: type[BaseModel], start: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        if not field.repr:  # internal
            continue
        key = start + (field.alias or name)
        inner = _model(field.annotation)
        if inner is None:
            yield key, _default(field), field.description or ""
        elif _is_mapping(field.annotation):
            yield key, "{}", "A text, or a table with these keys, for each answer column:"
            yield from _keys(inner, f"{key}.NAME.")
        else:
            yield from _keys(inner, f"{key}.")


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _model(annotation: Any) -> type[BaseModel] | None:
    """The settings class that a field's type is or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model(inner) for inner in get_args(annotation))
    return next((model for model in found if model), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _files(package: str) -> str:
    rows = []
    for path in sorted((ROOT / package).rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if path.name != "__init__.py" and text:
            rows.append((f"`{path.relative_to(ROOT / package)}`", _first_sentence(text)))
    return _table(("file", "what it is"), rows)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\w\.) (?=[A-Z`])", paragraph)[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
