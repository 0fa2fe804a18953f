"""One token for every lane: the step that runs most, under a CUDA graph where there is one.

A graph is captured for each sampler mode and each of a few lane counts; lanes are filled from the
lowest, so a thin tail takes a smaller graph. Knows lanes, no requests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.sampler import SamplerMode, sample
from pipeline.engine.slots import Slots
from pipeline.kernels.decode_attention import (
    DecodePlan,
    choose_splits,
    decode_attention,
    plan_decode,
)
from pipeline.kernels.rope import rope_and_cache
from pipeline.models.base import Model

SMALLEST_GRAPH = 16


class DecodeAttend:
    """`Attend` of one step: a token a lane, written to the lane's place."""

    def __init__(self, model: Model, cache: KVCache, places: Tensor, plan: DecodePlan) -> None:
        self.config = model.decoder.config
        self.cache = cache
        self.places = places
        self.plan = plan

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        k, v = self.cache.keys(layer), self.cache.values(layer)
        q = rope_and_cache(qkv, cos, sin, k, v, self.places, self.config.num_heads)
        c = self.config
        out = decode_attention(q, k, v, self.plan, c.scale, c.window(layer), c.softcap)
        return out.flatten(1)


class Decoder:
    """Runs steps over the lanes of `slots`."""

    def __init__(
        self, model: Model, cache: KVCache, slots: Slots, graphs: bool, max_length: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.slots = slots
        self.graphs = graphs and model.device.type == "cuda"
        self.max_length = max_length
        self.sizes = self._sizes()
        self._captured: dict[tuple[int, SamplerMode], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def _sizes(self) -> list[int]:
        sizes = [self.slots.num_slots]
        while sizes[-1] // 2 >= SMALLEST_GRAPH:
            sizes.append(sizes[-1] // 2)
        return sizes[::-1]

    def step(self, lanes: list[int], mode: SamplerMode, longest: int) -> tuple[Tensor, list[int]]:
        """One token for each of `lanes` (ascending); returns [2, n] tokens and states, and the
        lane of each column. `longest` is the longest length of any lane, this token included.
        """
        if self.model.device.type != "cuda":
            rows = torch.tensor(lanes, dtype=torch.int64)
            return self._run(rows, mode, longest), lanes
        size = next(s for s in self.sizes if s > lanes[-1])
        columns = list(range(size))
        if not self.graphs:
            return self._run(slice(0, size), mode, longest), columns
        if (size, mode) not in self._captured:
            self._captured[size, mode] = self._capture(size, mode)
        graph, out = self._captured[size, mode]
        graph.replay()
        return out, columns

    def _run(self, rows: Tensor | slice, mode: SamplerMode, longest: int) -> Tensor:
        slots, model = self.slots, self.model
        segments, places = slots.segments[rows], slots.places[rows]
        plan = plan_decode(segments, longest, self._splits(len(places)))
        attend = DecodeAttend(model, self.cache, places, plan)
        x = model.embed(slots.tokens[rows])
        positions = slots.positions[rows].expand(model.num_axes, -1)
        hidden = model.decoder(x, positions, attend, None)
        tokens, valid = sample(model.decoder.logits(hidden), slots, rows, mode)
        return slots.accept(rows, tokens, valid, first=False)

    def _splits(self, num_lanes: int) -> int:
        device = self.model.device
        if device.type != "cuda":
            return 1
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        config = self.model.decoder.config
        return choose_splits(num_lanes, config.num_kv_heads, self.max_length, sms)

    def _capture(self, size: int, mode: SamplerMode) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a step; the warm-up before it runs on idle copies of the lanes' states."""
        rows = slice(0, size)
        kept = {n: getattr(self.slots, n)[rows].clone() for n in self.slots.CHANGING}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.slots.status[rows] = 0
            self.slots.places[rows] = 0
            for _ in range(2):
                self._run(rows, mode, self.max_length)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._run(rows, mode, self.max_length)
        self._pool = self._pool or graph.pool()
        for name, value in kept.items():
            getattr(self.slots, name)[rows] = value
        return graph, out
