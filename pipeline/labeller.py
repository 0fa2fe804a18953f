"""Rows of shards in, answers out: the pipeline's front door.

Wires preparer, planner, feeder and engine together for one process on one device. Knows no run
folder, no lease and no retry.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.errors import RowError
from pipeline.feeder import SHARED_BYTES, Feeder
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.planner import Planner, PlanStats
from pipeline.prefetch import ImageLoader
from pipeline.prepare import Preparer
from pipeline.rows import Answer, Completion, Group, Prefix, Request, RequestKey, Row, ShardWork
from pipeline.settings import LabelSettings
from pipeline.spool import Spool
from pipeline.tokenizer import Tokenizer

FIRST_WINDOW = 64  # requests planned together at first, so that the device has work at once
WINDOW_GROWTH = 8
WINDOW_REQUESTS = 16_384  # planned together at most
MAX_WORKERS = 16
TURN_SEC = 1e-4  # of a Python thread while another waits; 5 ms by default


class Labeller:
    """Answers shards with one model; built once, used until `close`."""

    def __init__(self, settings: LabelSettings) -> None:
        from pipeline.engine.build import build_engine, choose_device, set_threads

        self.settings = settings
        self.checkpoint = Checkpoint.open(settings.model)
        self.family = family_for(self.checkpoint, settings.model)
        self.tokenizer = Tokenizer(
            self.checkpoint, self.family.control, self.family.template.spoken
        )
        self.spool = Spool()
        self.loader = ImageLoader(settings.input)
        self.preparer = Preparer(
            settings, self.family, self.tokenizer, self.spool, self.loader.load
        )
        on_cpu = choose_device(settings.engine).type == "cpu"
        workers = _num_workers(settings, on_cpu)
        self.feeder = Feeder(
            workers, SHARED_BYTES, settings.input.max_pixels,
            resize=on_cpu or not self.family.fused,
            video_timeout_sec=settings.input.video_timeout_sec,
            transparency=self.family.transparency,
        )  # fmt: skip
        set_threads(settings.engine, workers)
        if self.family.fused:
            self.engine: Any = build_engine(settings, self.checkpoint, self.family, self.tokenizer)
        else:
            from pipeline.models.generic import GenericEngine

            device = choose_device(settings.engine)
            self.engine = GenericEngine(self.checkpoint, self.family, settings, device)
        self.planner = Planner(
            settings.engine, shares=self.family.fused, whole_images=self.family.images_reach_back
        )
        self.plan_stats = PlanStats()
        self._early: deque[Answer] = deque()  # answers that need no engine
        self._endings: dict[RequestKey, tuple[tuple[str, ...], bool]] = {}  # stops, has a schema
        self._open = OpenShards(self.spool)

    def label(self, shards: Iterable[ShardWork]) -> Iterator[Answer]:
        """Yield one answer for each prompt of each row that is not done, in any order.

        `shards` is pulled when the engine runs low, so shards may overlap.
        """
        # NOTE: the engine's thread gives up its turn with every kernel that it asks for. While rows
        # are prepared beside it, each would cost it 5 ms, and the device would run out of work.
        turn_before = sys.getswitchinterval()
        sys.setswitchinterval(TURN_SEC)
        feed = self.feeder.feed(self._items(shards))
        try:
            for completion in self.engine.run(feed):
                yield from self._take_early()
                if completion is not None:
                    yield self._answer(completion)
            yield from self._take_early()
        finally:
            feed.close()
            sys.setswitchinterval(turn_before)

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
        self.loader.close()
        self.preparer.close()
        self.spool.close()

    def _items(self, shards: Iterable[ShardWork]) -> Iterator[Prefix | Group]:
        """Runs in the feeder's thread."""
        limit = FIRST_WINDOW
        for work in shards:
            self._open.begin(work.shard)
            window: list[Request] = []
            for row in self.loader.ahead(work.rows, self._wants(work)):
                for made in self.preparer.prepare(work.shard, row, work.done):
                    if isinstance(made, Answer):
                        self._early.append(made)
                    else:
                        window.append(made)
                if len(window) >= limit:
                    yield from self._plan(window)
                    window, limit = [], min(limit * WINDOW_GROWTH, WINDOW_REQUESTS)
            yield from self._plan(window)
            self._open.all_planned(work.shard)

    def _wants(self, work: ShardWork) -> Callable[[Row], bool]:
        """Whether a prompt of a row is still to be answered."""
        names = self.preparer.prompt_names
        return lambda row: any((row.index, name) not in work.done for name in names)

    def _plan(self, window: list[Request]) -> Iterator[Prefix | Group]:
        for request in window:
            self._open.add(request.key.shard)
            if request.sampling.stop or request.schema:
                self._endings[request.key] = (request.sampling.stop, request.schema is not None)
        plan = self.planner.plan(window)
        self.plan_stats.add(plan.stats)
        yield from plan.items

    def _take_early(self) -> Iterator[Answer]:
        while self._early:
            yield self._early.popleft()

    def _answer(self, completion: Completion) -> Answer:
        key = completion.key
        self._open.remove(key.shard)
        stops, guided = self._endings.pop(key, ((), False))
        if completion.error is not None:
            return Answer.failed(key, completion.error)
        text = _cut(self.tokenizer.decode(completion.output_ids), stops)
        error = _schema_error(text, completion.finish_reason) if guided else None
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


class OpenShards:
    """Counts each shard's requests that are still out; with the last, its images are forgotten.

    Counted up in the feeder's thread and down in the engine's.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, shard: str) -> None:
        self.add(shard)  # held until the whole shard is planned

    def add(self, shard: str) -> None:
        with self._lock:
            self._counts[shard] = self._counts.get(shard, 0) + 1

    def all_planned(self, shard: str) -> None:
        self.remove(shard)

    def remove(self, shard: str) -> None:
        with self._lock:
            self._counts[shard] -= 1
            last = self._counts[shard] == 0
            if last:
                del self._counts[shard]
        if last:
            self._spool.forget(shard)


def _schema_error(text: str, finish_reason: str) -> RowError | None:
    if finish_reason == "length":
        return RowError("schema_invalid", "The answer was cut off before its JSON was complete.")
    try:
        json.loads(text)
    except ValueError as error:
        return RowError("schema_invalid", f"The answer is no JSON: {error}")
    return None


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
