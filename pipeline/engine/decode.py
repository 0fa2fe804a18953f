"""One token for every running lane: the step that runs most, under a CUDA graph where there is one.

A graph is captured for each sampler mode and each of a few lane counts. It reads which lanes it
serves from a small table, so a step costs what its running lanes cost, wherever they stand. Knows
lanes, no requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.cascade import SharedTable, max_items, share
from pipeline.engine.cross_cache import CrossCache
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.sampler import GREEDY, SamplerMode, sample
from pipeline.engine.sequence import Sequence
from pipeline.engine.slots import MAX_SEGMENTS, Slots
from pipeline.kernels.backend import invariant, use_triton
from pipeline.kernels.cascade_attention import SharedReads, cascade_attention, lanes_per_item
from pipeline.kernels.decode_attention import (
    DecodePlan,
    choose_splits,
    decode_attention,
    plan_decode,
)
from pipeline.kernels.lanes import advance
from pipeline.kernels.mla_attention import mla_decode, mla_rope_and_cache
from pipeline.kernels.rope import rope_and_cache
from pipeline.kernels.transfer import to_device
from pipeline.models.base import Model
from pipeline.models.decoder import Attend

SMALLEST_GRAPH = 16  # lanes
MANY_LANES = 256  # above which shared ranges need fewer chunks to fill the device


class DecodeAttend:
    """`Attend` of one step: a token a lane, written to the lane's place."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        places: Tensor,
        plan: DecodePlan,
        shared: SharedReads | None = None,
    ) -> None:
        self.config = model.decoder.config
        self.cache = cache
        self.places = places
        self.plan = plan if shared is None else shared.without(plan)
        self.shared = shared

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        c = self.config
        if c.mla is not None:
            rows = self.cache.rows(layer)
            q = mla_rope_and_cache(qkv, cos, sin, rows, self.places)
            return mla_decode(q, rows, self.plan, c.scale, c.mla.rope).flatten(1)
        k, v = self.cache.keys(layer), self.cache.values(layer)
        q = rope_and_cache(qkv, cos, sin, k, v, self.places, c.num_heads)
        if self.shared is not None:
            out = cascade_attention(q, k, v, self.plan, self.shared, c.scale, c.softcap)
        else:
            out = decode_attention(q, k, v, self.plan, c.scale, c.window(layer), c.softcap)
        return out.flatten(1)


@dataclass(slots=True)
class Captured:
    """One graph with what it reads and writes: its lanes int64 [n], tokens and states [2, n].

    `table` is what `shared` holds at present.
    """

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    shared: SharedReads | None
    result: Tensor
    table: SharedTable | None = None


class Decoder:
    """Runs steps over the lanes of `slots`."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        slots: Slots,
        graphs: bool,
        max_length: int,
        cross: CrossCache | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.cross = cross
        self.slots = slots
        self.graphs = graphs and model.device.type == "cuda"
        self.max_length = max_length
        self.sizes = graph_sizes(slots.num_slots)
        self._captured: dict[tuple[int, SamplerMode, bool], Captured] = {}
        self._pool: Any = None
        self._lanes_per_item = self._cascade_width()
        windows = [w for w in model.decoder.config.windows if w is not None]
        self._reach = min(windows, default=math.inf)  # of every layer
        self._table: tuple[Seq[Sequence], SharedTable | None] = ((), None)

    def step(self, sequences: Seq[Sequence], mode: SamplerMode, longest: int) -> Tensor:
        """One token for each running sequence; returns [2, >= n] of tokens and states, by column.

        `longest` is the longest length of any, this token included.
        """
        device = self.model.device
        lanes = [s.lane for s in sequences]
        size = len(lanes)
        if device.type == "cuda":
            size = next(s for s in self.sizes if s >= len(lanes))
        # NOTE: the spare lane is always idle; a step may serve it any number of times.
        table = torch.tensor(lanes + [self.slots.spare] * (size - len(lanes)), dtype=torch.int64)
        # NOTE: shared ranges are read whole, so no window may cut them.
        shared = self._shared(sequences) if longest <= self._reach else None
        if not self.graphs:
            reads = None
            if shared is not None:
                reads = self._reads(size)
                _fill(reads, shared)
            return self._run(to_device(table, device), mode, longest, reads)
        key = size, mode, shared is not None
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        captured = self._captured[key]
        captured.rows.copy_(table.pin_memory(), non_blocking=True)
        if shared is not captured.table:
            assert shared is not None
            assert captured.shared is not None
            _fill(captured.shared, shared)
            captured.table = shared
        captured.graph.replay()
        return captured.result

    def drop_graphs(self) -> None:
        """Run without graphs from now on, and give back what they held."""
        self.graphs = False
        self._captured.clear()
        self._pool = None

    def _run(
        self, rows: Tensor, mode: SamplerMode, longest: int, shared: SharedReads | None = None
    ) -> Tensor:
        slots, model = self.slots, self.model
        segments, places = slots.segments[rows], slots.places[rows]
        num_kv_heads = model.decoder.config.num_kv_heads
        splits = choose_splits(len(places), num_kv_heads, self.max_length, model.device)
        plan = plan_decode(segments, longest, splits)
        attend: Attend = DecodeAttend(model, self.cache, places, plan, shared)
        if self.cross is not None:
            attend = self.cross.decode(attend, rows)
        x = model.embed(slots.tokens[rows])
        positions = slots.positions[rows].expand(model.num_axes, -1)
        hidden = model.decoder(x, positions, attend, None)
        logits = model.decoder.logits(hidden, wide=mode != GREEDY)
        tokens, valid = sample(logits, slots, rows, mode)
        return advance(slots, rows, tokens, valid, step=1)

    def _cascade_width(self) -> int:
        """Lanes that read a shared range together; 0 where lanes must read alone."""
        c = self.model.decoder.config
        plain = c.mla is None and self.cross is None
        if not plain or invariant() or not use_triton(self.model.embedding):
            return 0
        return lanes_per_item(c.num_heads, c.num_kv_heads)

    def _shared(self, sequences: Seq[Sequence]) -> SharedTable | None:
        """The table of what these sequences share, made anew when they change."""
        if not self._lanes_per_item:
            return None
        known = self._table[0]
        if len(known) != len(sequences) or any(map(is_not, known, sequences)):
            self._table = sequences, share(sequences, self._lanes_per_item)
        return self._table[1]

    def _reads(self, size: int) -> SharedReads:
        """Room for the tables of `size` lanes, all idle."""
        width, device = self._lanes_per_item, self.model.device
        items = torch.zeros(max_items(size, width), 3 + width, dtype=torch.int32, device=device)
        taken = torch.zeros(size, MAX_SEGMENTS, dtype=torch.bool, device=device)
        return SharedReads(items, taken, num_chunks=2 if size > MANY_LANES else 4)

    def _capture(self, size: int, mode: SamplerMode, cascade: bool) -> Captured:
        """Capture a step of `size` lanes; the warm-up runs before it serve the spare lane."""
        shared = self._reads(size) if cascade else None
        rows = torch.full((size,), self.slots.spare, dtype=torch.int64, device=self.model.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(rows, mode, self.max_length, shared)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._run(rows, mode, self.max_length, shared)
        self._pool = self._pool or graph.pool()
        return Captured(graph, rows, shared, result)


def _fill(reads: SharedReads, table: SharedTable) -> None:
    """Copy a table to the device; what it does not fill is idle."""
    device = reads.items.device
    items = torch.zeros(reads.items.shape, dtype=torch.int32)
    taken = torch.zeros(reads.taken.shape, dtype=torch.bool)
    items[: len(table.items)] = torch.from_numpy(table.items)
    taken[: len(table.taken)] = torch.from_numpy(table.taken)
    reads.items.copy_(to_device(items, device))
    reads.taken.copy_(to_device(taken, device))


def graph_sizes(num_slots: int) -> list[int]:
    """Lane counts that graphs are captured for: each is at most half as large again as the last."""
    sizes = [min(SMALLEST_GRAPH, num_slots)]
    while sizes[-1] < num_slots:
        low = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(min(low * 3 // 2 if sizes[-1] == low else low * 2, num_slots))
    return sizes
