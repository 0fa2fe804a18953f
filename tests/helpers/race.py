"""Many threads that do one thing at the same moment, and who of them won."""

from __future__ import annotations

import threading
from collections.abc import Callable


def race(number: int, act: Callable[[int], bool]) -> list[int]:
    """Run `act` in threads at once; the numbers of those that say that they won."""
    barrier, winners = threading.Barrier(number), []

    def run(i: int) -> None:
        barrier.wait()
        if act(i):
            winners.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners
