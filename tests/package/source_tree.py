"""The repository's Python files as `ast`, for the tests of this folder. Runs no project code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "jobs")
FOLDERS = (*PACKAGES, "tests", "scripts")


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy` means inside a function or for type checkers only."""

    module: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Source:
    """One Python file of the repository."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def top(self) -> str:
        return self.path.relative_to(ROOT).parts[0]

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def imports(self) -> Iterator[Import]:
        yield from _imports(self.tree.body, lazy=False)


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the project's own folders."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            found.append(Source(path, text, ast.parse(text, str(path))))
    return tuple(found)


def packages() -> tuple[Source, ...]:
    return tuple(s for s in sources() if s.top in PACKAGES)


def _imports(body: list[ast.stmt], lazy: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(a.name, node.lineno, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _names(node, lazy)
        inner_lazy = lazy or _is_lazy(node)
        for inner in ("body", "orelse", "finalbody"):
            yield from _imports(_statements(node, inner), inner_lazy)
        for handler in getattr(node, "handlers", []):
            yield from _imports(handler.body, inner_lazy)
        for case in getattr(node, "cases", []):
            yield from _imports(case.body, inner_lazy)


def _statements(node: ast.stmt, name: str) -> list[ast.stmt]:
    value = getattr(node, name, [])
    return value if isinstance(value, list) else []


def _names(node: ast.ImportFrom, lazy: bool) -> Iterator[Import]:
    """`from a import b` names a, and a.b in case b is a module."""
    module = node.module or ""
    yield Import(module, node.lineno, lazy)
    for alias in node.names:
        yield Import(f"{module}.{alias.name}", node.lineno, lazy)


def _is_lazy(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
