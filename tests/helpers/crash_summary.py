"""Adds the tallies of all crash tests up and prints them at the end of the session.

Hooks for `tests/conftest.py`: with several test processes only the first one prints.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

MIN_FAULTS = "CRASH_MIN_FAULTS"  # set by `make test-crash`: fewer is a failed session
KEY = "crash tally"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    faults, rows = _totals(terminalreporter)
    if not faults:
        return
    kinds = ", ".join(f"{kind} {count}" for kind, count in faults.most_common())
    terminalreporter.section("crash suite")
    terminalreporter.write_line(f"{faults.total()} faults injected: {kinds}")
    terminalreporter.write_line(
        f"{rows['checked']} rows checked: {rows['lost']} lost, {rows['doubled']} doubled, "
        f"{rows['changed']} changed"
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    wanted = int(os.environ.get(MIN_FAULTS, "0"))
    if not wanted or hasattr(session.config, "workerinput") or session.exitstatus:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (count := _totals(reporter)[0].total()) < wanted:
        print(f"\nonly {count} faults were injected, not {wanted}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _totals(reporter: Any) -> tuple[Counter[str], Counter[str]]:
    faults: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for report in [r for reports in reporter.stats.values() for r in reports]:
        if getattr(report, "when", "") == "teardown":
            for key, told in report.user_properties:
                if key == KEY:
                    faults.update(told[0])
                    rows.update(told[1])
    return faults, rows
