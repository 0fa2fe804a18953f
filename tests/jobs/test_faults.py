"""Fault points: the table tells all of them, each triggers as asked, and none by itself."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from jobs import faults


@pytest.fixture(autouse=True)
def _forget() -> None:
    faults.reset()


def test_the_table_is_the_code(root: Path) -> None:
    used = set()
    for file in (root / "jobs").rglob("*.py"):
        used |= set(re.findall(r"\bfault\(\s*\"([^\"]+)\"", file.read_text(encoding="utf-8")))
    assert used == set(faults.POINTS)


def test_nothing_happens_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for point in faults.POINTS:
        assert faults.fault(point) is None
    monkeypatch.setenv(faults.ENV, "commit.after_link:eio")
    assert faults.fault("commit.before_link") is None


def test_the_hit_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.ENV, "storage.read:eio:2, storage.write:enospc:2+")
    faults.fault("storage.read")
    with pytest.raises(OSError, match="injected at storage.read"):
        faults.fault("storage.read")
    faults.fault("storage.read")
    faults.fault("storage.write")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            faults.fault("storage.write")


def test_signals_and_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setenv(faults.ENV, "storage.read:term,storage.write:sleep=0.05")
    faults.fault("storage.read")
    signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    start = time.monotonic()
    faults.fault("storage.write")
    assert time.monotonic() - start >= 0.05
    monkeypatch.setenv(faults.ENV, "storage.read:torn:2")
    assert faults.fault("storage.read") == "torn"


def test_what_triggers_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(faults.ENV, "storage.read:sleep=0:2")
    monkeypatch.setenv(faults.LOG_ENV, str(tmp_path / "log"))
    for _ in range(3):
        faults.fault("storage.read")
    assert (tmp_path / "log").read_text() == f"sleep=0 storage.read {os.getpid()}\n"


def test_a_kill_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.ENV, "storage.read:kill")
    pid = os.fork()
    if pid == 0:
        faults.fault("storage.read")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("text", ["nowhere:kill", "storage.read:explode", "storage.read"])
def test_a_typo_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(faults.ENV, text)
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        faults.fault("storage.read")
