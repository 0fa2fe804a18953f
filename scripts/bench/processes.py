"""What this process and the processes below it use: processor seconds and resident memory.

Reads /proc; a process that ends takes its numbers with it.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def family() -> list[int]:
    """This process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [os.getpid()]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


def family_cpu_seconds() -> float:
    """User and system seconds of the living, and of the ended that were waited for."""
    ticks = sum(int(t) for pid in family() if (f := _stat(pid)) for t in f[11:15])
    return ticks / _TICKS


def family_resident_bytes() -> int:
    """Resident memory of all, pages that they share counted once (proportionally)."""
    return sum(_proportional_bytes(pid) for pid in family())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …"""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _proportional_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    fields = _stat(pid)
    return int(fields[21]) * _PAGE if fields else 0
