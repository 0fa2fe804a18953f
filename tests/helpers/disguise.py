"""Makes a forked test process believe in another machine, another wall clock, or less memory.

FAKE_MACHINE   the name of the machine that it runs on (hosts cannot see each other's processes)
FAKE_CLOCK     seconds that the wall clock jumps by, comma-separated, one after the other, a jump
               at every tenth look
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections.abc import Callable


def put_on() -> None:
    """Do what the environment asks."""
    if machine := os.environ.get("FAKE_MACHINE"):
        from jobs import leases

        leases.machine_id = lambda: machine
    if memory := os.environ.get("FAKE_MEMORY"):
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    if jumps := os.environ.get("FAKE_CLOCK"):
        _jump([float(jump) for jump in jumps.split(",")])


def _jump(jumps: list[float]) -> None:
    plain, gmtime = time.time, time.gmtime
    looks, offset = itertools.count(), 0.0
    order = itertools.cycle(jumps)

    def now() -> float:
        nonlocal offset
        if next(looks) % 10 == 0:
            offset = next(order)
        return plain() + offset

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)
    time.gmtime = _gmtime(gmtime, now)


def _gmtime(
    plain: Callable[[float], time.struct_time], now: Callable[[], float]
) -> Callable[..., time.struct_time]:
    return lambda seconds=None: plain(now() if seconds is None else seconds)
