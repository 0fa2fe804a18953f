"""Named points where a crash test makes this process die or an operation fail.

A point does nothing unless `VLM_BATCH_FAULT` names it: `point:action[:hit]`, several separated by
commas; `hit` is the first passage that triggers (1 by default). What triggers is first noted in the
file of `VLM_BATCH_FAULT_LOG`, so that a test counts what happened and not what it asked for. Knows
nothing of what the points do, and is no part of any decision in a real run.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from types import MappingProxyType
from typing import NamedTuple

ENV = "VLM_BATCH_FAULT"
LOG_ENV = "VLM_BATCH_FAULT_LOG"

POINTS = MappingProxyType(
    {
        "plan.before_write": "a new plan part is about to be written",
        "plan.after_write": "the new plan part exists",
        "manifest.before_write": "the manifest is about to be written",
        "manifest.after_write": "the manifest exists",
        "lease.before_acquire": "a claim file is about to be created",
        "lease.after_acquire": "the claim file exists",
        "lease.heartbeat": "the claim file is about to be renewed",
        "lease.before_release": "the claim file is about to be deleted",
        "journal.before_open": "an attempt's journal is about to be created",
        "journal.before_append": "records are about to be written",
        "journal.append": "in the middle of writing records (`torn` writes half, then kills)",
        "journal.after_append": "the records are written, not yet synced",
        "journal.sync": "the journal is about to be synced",
        "journal.after_sync": "the journal is synced",
        "journal.read": "an earlier attempt's journal is about to be read",
        "commit.before_build": "a shard has all answers; its part is not yet written",
        "commit.before_write": "the part's private file is about to be written",
        "commit.after_write": "the private file is written, not yet synced",
        "commit.before_link": "the private file is synced, not yet visible",
        "commit.after_link": "the part is visible; its journals still exist",
        "commit.before_replace": "a redone part has won and is not yet visible",
        "commit.after_replace": "a redone part is visible",
        "commit.before_clean": "the shard's journals are about to be deleted",
        "commit.after_clean": "the shard's journals are gone, its lease is still held",
        "storage.read": "a file of the run folder is about to be read",
        "storage.write": "a small file of the run folder is about to be written",
        "storage.list": "a folder of the run folder is about to be listed",
        "storage.delete": "a file of the run folder is about to be deleted",
    }
)

_ERRNOS = {
    "enospc": errno.ENOSPC,
    "eio": errno.EIO,
    "erofs": errno.EROFS,
    "edquot": errno.EDQUOT,
    "estale": errno.ESTALE,
    "ebusy": errno.EBUSY,
}
_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,
    "int": signal.SIGINT,
}
ACTIONS = (*_SIGNALS, *_ERRNOS, "torn", "sleep=SEC")


class _Fault(NamedTuple):
    action: str
    hit: int  # the first passage that triggers
    always: bool  # every later passage triggers too


_hits: dict[str, int] = {}
_parsed: tuple[str, dict[str, _Fault]] = ("", {})


def fault(point: str) -> str | None:
    """Pass a point: return None, or do what the environment asks (`torn` is the caller's to do).

    Raises: OSError with the errno that is asked for.
    """
    text = os.environ.get(ENV)
    if not text:
        return None
    found = _faults(text).get(point)
    if found is None:
        return None
    _hits[point] = _hits.get(point, 0) + 1
    if _hits[point] != found.hit and not (found.always and _hits[point] > found.hit):
        return None
    _note(point, found.action)
    return _act(point, found.action)


def kill_self() -> None:
    """Die as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def reset() -> None:
    """Forget how often each point was passed (tests)."""
    _hits.clear()


def _faults(text: str) -> dict[str, _Fault]:
    global _parsed
    if _parsed[0] != text:
        _parsed = (text, dict(_parse(part) for part in text.split(",")))
    return _parsed[1]


def _parse(text: str) -> tuple[str, _Fault]:
    point, action, *rest = text.strip().split(":")
    if point not in POINTS:
        raise ValueError(f"{ENV}: unknown point {point!r}")
    hit = rest[0] if rest else "1"
    return point, _Fault(action, int(hit.rstrip("+")), hit.endswith("+"))


def _note(point: str, action: str) -> None:
    if path := os.environ.get(LOG_ENV):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{action} {point} {os.getpid()}\n")


def _act(point: str, action: str) -> str | None:
    if action == "torn":
        return action
    if action in _ERRNOS:
        raise OSError(_ERRNOS[action], f"{os.strerror(_ERRNOS[action])} (injected at {point})")
    if action.startswith("sleep="):
        time.sleep(float(action[6:]))
        return None
    if action not in _SIGNALS:
        raise ValueError(f"{ENV}: unknown action {action!r}")
    os.kill(os.getpid(), _SIGNALS[action])
    if action == "kill":
        time.sleep(60)
    return None
