"""Rows of shards in, answers out: the pipeline's front door.

Wires preparer, planner, feeder and engine together for one process on one device. Knows no run
folder, no lease and no retry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import RowError
from pipeline.feeder import Feeder
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.planner import Planner, PlanStats
from pipeline.prepare import Preparer
from pipeline.rows import Answer, Completion, Group, Prefix, Request, RequestKey, ShardWork
from pipeline.settings import LabelSettings
from pipeline.spool import Spool
from pipeline.tokenizer import Tokenizer

WINDOW_REQUESTS = 16_384  # planned together at most
MAX_WORKERS = 16


class Labeller:
    """Answers shards with one model; built once, used until `close`."""

    def __init__(self, settings: LabelSettings) -> None:
        from pipeline.engine.build import build_engine, choose_device, set_threads

        self.settings = settings
        self.checkpoint = Checkpoint.open(settings.model)
        self.family = family_for(self.checkpoint, settings.model)
        self.tokenizer = Tokenizer(self.checkpoint, self.family.control)
        self.spool = Spool()
        self.preparer = Preparer(settings, self.family, self.tokenizer, self.spool)
        on_cpu = choose_device(settings.engine).type == "cpu"
        workers = _num_workers(settings, on_cpu)
        self.feeder = Feeder(
            workers, settings.input.max_bytes, settings.input.max_pixels,
            resize=on_cpu or not self.family.fused,
        )  # fmt: skip
        set_threads(settings.engine, workers)
        if self.family.fused:
            self.engine: Any = build_engine(
                settings, self.checkpoint, self.family, self.tokenizer
            )
        else:
            from pipeline.models.generic import GenericEngine

            device = choose_device(settings.engine)
            self.engine = GenericEngine(self.checkpoint, self.family, settings, device)
        self.planner = Planner(settings.engine, shares=self.family.fused)
        self.plan_stats = PlanStats()
        self._early: list[Answer] = []  # answers that need no engine
        self._open: dict[str, int] = {}  # requests of a shard still out
        self._stops = {}  # type: ignore[var-annotated]

    def label(self, shards: Iterable[ShardWork]) -> Iterator[Answer]:
        """Yield one answer for each prompt of each row that is not done, in any order.

        `shards` is pulled when the engine runs low, so shards may overlap.
        """
        feed = self.feeder.feed(self._items(shards))
        try:
            for completion in self.engine.run(feed):
                yield from self._take_early()
                yield self._answer(completion)
            yield from self._take_early()
        finally:
            feed.close()

    def drain(self) -> None:
        """Stop admitting; `label` ends when what decodes now has ended."""
        self.engine.draining = True

    def stats(self) -> dict[str, Any]:
        """Counters and stage times so far, for reports."""
        plan = {n: getattr(self.plan_stats, n) for n in self.plan_stats.__slots__}
        plan["padding_share"] = self.plan_stats.padding_share
        return {"engine": self.engine.stats.as_dict(), "plan": plan}

    def close(self) -> None:
        self.feeder.close()
        self.spool.close()

    def _items(self, shards: Iterable[ShardWork]) -> Iterator[Prefix | Group]:
        for work in shards:
            window: list[Request] = []
            for row in work.rows:
                for made in self.preparer.prepare(work.shard, row, work.done):
                    if isinstance(made, Answer):
                        self._early.append(made)
                    else:
                        window.append(made)
                if len(window) >= WINDOW_REQUESTS:
                    yield from self._plan(window)
                    window = []
            yield from self._plan(window)

    def _plan(self, window: list[Request]) -> Iterator[Prefix | Group]:
        for request in window:
            shard = request.key.shard
            self._open[shard] = self._open.get(shard, 0) + 1
            if request.sampling.stop:
                self._stops[request.key] = request.sampling.stop
        plan = self.planner.plan(window)
        self.plan_stats.add(plan.stats)
        yield from plan.items

    def _take_early(self) -> Iterator[Answer]:
        early, self._early = self._early, []
        yield from early

    def _answer(self, completion: Completion) -> Answer:
        key = completion.key
        self._close_shard(key)
        stops = self._stops.pop(key, ())
        if completion.error is not None:
            return Answer.failed(key, completion.error)
        text = _cut(self.tokenizer.decode(completion.output_ids), stops)
        error = self.preparer.check_answer(key, text, completion.finish_reason)
        return Answer(
            key=key,
            text=text,
            finish_reason=completion.finish_reason,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_cached_tokens=completion.num_cached_tokens,
            num_output_tokens=len(completion.output_ids),
            error_code=error.code if error else None,
            error=str(error) if error else None,
        )

    def _close_shard(self, key: RequestKey) -> None:
        """Forget a shard's spooled images with its last answer so far."""
        self._open[key.shard] -= 1
        if self._open[key.shard] == 0:
            del self._open[key.shard]


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    if not stops:
        return text
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0]


def _num_workers(settings: LabelSettings, on_cpu: bool) -> int:
    if settings.engine.workers != "auto":
        return settings.engine.workers
    cores = len(os.sched_getaffinity(0))
    return 1 if on_cpu else max(1, min(MAX_WORKERS, cores - 2))


__all__ = ["Labeller", "RowError"]
