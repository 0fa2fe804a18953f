"""Where a run's time goes and how full the device was kept: counters and stage times.

Stage times are the device's own (CUDA events, read a step late) or wall time on a CPU. Knows no
request.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class EngineStats:
    """Sums over one engine's life; seconds by stage in `seconds`."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_prefill_batches: int = 0
    num_prefill_tokens: int = 0  # computed
    num_prompt_tokens: int = 0  # of all admitted requests
    num_cached_tokens: int = 0  # read from a prefix or a group instead of computed
    num_image_tokens: int = 0
    num_images: int = 0
    num_steps: int = 0
    num_lane_steps: int = 0  # steps x lanes offered
    num_running_lane_steps: int = 0  # lanes that ran in them
    num_busy_steps: int = 0  # steps that were run while more work waited
    num_busy_lane_steps: int = 0  # lanes that ran in those
    num_output_tokens: int = 0
    num_out_of_memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__slots__ if name != "seconds"}
        full = self.num_running_lane_steps / self.num_lane_steps if self.num_lane_steps else 0.0
        return found | {"slot_occupancy": full, "seconds": dict(self.seconds)}


class StageTimer:
    """Adds each stage's time to `EngineStats.seconds` without making the device wait.

    On a GPU, "idle" is the time between two stages: the device had been asked for nothing.
    """

    def __init__(self, stats: EngineStats, device: torch.device) -> None:
        self.stats = stats
        self.cuda = device.type == "cuda"
        self._open: deque[tuple[str, Any, Any]] = deque()
        self._ended: Any = None  # when the device ended its last stage that was read

    def begin(self) -> None:
        """A run begins: what the device does not do from now on is idle time."""
        if self.cuda:
            self.settle(wait=True)  # of a run that was left
            self._ended = torch.cuda.Event(enable_timing=True)
            self._ended.record()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if not self.cuda:
            start = time.perf_counter()
            yield
            self.stats.seconds[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((name, begin, end))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Wall time of the host, for what no device does (waiting for images)."""
        start = time.perf_counter()
        yield
        self.stats.seconds[name] += time.perf_counter() - start

    def settle(self, wait: bool = False) -> None:
        """Read the stages that the device has finished."""
        while self._open and (wait or self._open[0][2].query()):
            name, begin, end = self._open.popleft()
            if wait:
                end.synchronize()
            self.stats.seconds["idle"] += self._ended.elapsed_time(begin) / 1000
            self.stats.seconds[name] += begin.elapsed_time(end) / 1000
            self._ended = end
