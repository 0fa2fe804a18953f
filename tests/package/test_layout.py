"""The sizes and habits that keep the code readable: files, functions, docstrings, leftovers."""

from __future__ import annotations

import ast
import re
import statistics

from tests.package.source_tree import Source, packages, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_files_are_short() -> None:
    long = {s.name: n for s in sources() if (n := s.text.count("\n") + 1) > MAX_FILE_LINES}
    assert not long


def test_functions_are_short() -> None:
    long = [
        f"{s.name}:{f.lineno} {f.name} {_length(f)}"
        for s in sources()
        for f in s.functions()
        if _length(f) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_median_function_is_very_short() -> None:
    lengths = [_length(f) for s in packages() for f in s.functions()]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


def _undocumented(source: Source) -> bool:
    return bool(source.tree.body) and not ast.get_docstring(source.tree)


def test_every_module_says_what_it_is() -> None:
    assert not [s.name for s in sources() if _undocumented(s)]


def test_every_package_folder_is_a_package() -> None:
    folders = {s.path.parent for s in packages()}
    assert not [str(f) for f in folders if not (f / "__init__.py").exists()]


def test_nothing_is_left_to_do() -> None:
    leftover = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{s.name}:{number}"
        for s in packages()
        for number, line in enumerate(s.text.splitlines(), 1)
        if leftover.search(line)
    ]
    assert not found


def test_test_files_have_unique_names() -> None:
    shared = {"__init__.py", "conftest.py", "record.py"}
    names = [s.path.name for s in sources() if s.top == "tests" and s.path.name not in shared]
    assert sorted(names) == sorted(set(names))
