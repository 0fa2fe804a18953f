"""Prompt tokens to keys, values and each request's first token: one packed batch, nothing padded.

A batch holds pieces of all kinds (prefix, group, own): keys of a layer are written before any query
of that layer reads them, so a piece may build on another of the same batch. Knows no queue.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.cross_cache import CrossCache
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.schedule import Piece
from pipeline.kernels.cached_rows import plain_rows
from pipeline.kernels.decode_attention import DecodePlan, decode_attention, plan_decode
from pipeline.kernels.fp8 import Quantized
from pipeline.kernels.mla_attention import mla_decode, mla_prefill, mla_rope_and_cache
from pipeline.kernels.prefill_attention import (
    PrefillPlan,
    Run,
    prefill_attention,
    prefill_plan_for,
)
from pipeline.kernels.rope import rope_and_cache
from pipeline.kernels.transfer import to_device, upload
from pipeline.models.base import Model, image_spans
from pipeline.models.decoder import Attend
from pipeline.rows import ImageLayout

MAX_IMAGE_TOKENS = 4_096  # of one pass of the image tower; more is no faster


class PrefillAttend:
    """`Attend` of one batch; in the last layer, only the rows `last` ask.

    Of a float8 cache, `plan` is over the rows at `gathered`, which are made plain for each layer.
    """

    def __init__(
        self,
        cache: KVCache,
        places: Tensor,
        plan: PrefillPlan,
        last_plan: DecodePlan,
        model: Model,
        gathered: Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.places = places
        self.plan = plan
        self.last_plan = last_plan
        self.config = model.decoder.config
        self.gathered = gathered

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        if self.config.mla is not None:
            return self._latent(layer, qkv, cos, sin, last)
        k, v = self.cache.keys(layer), self.cache.values(layer)
        q = rope_and_cache(qkv, cos, sin, k, v, self.places, self.config.num_heads)
        c = self.config
        window = c.window(layer)
        if last is None:
            rows = cast("tuple[Tensor, Tensor]", (k, v))
            if self.gathered is not None:
                rows = plain_rows(cast(Quantized, k), cast(Quantized, v), self.gathered, q.dtype)
            return prefill_attention(q, *rows, self.plan, c.scale, window, c.softcap).flatten(1)
        # NOTE: a prompt's last token closes its span, if it stands in one: it sees no later key.
        q = q.index_select(0, last)
        return decode_attention(q, k, v, self.last_plan, c.scale, window, c.softcap).flatten(1)

    def _latent(
        self, layer: int, packed: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        rows, c = self.cache.rows(layer), self.config
        assert c.mla is not None
        q = mla_rope_and_cache(packed, cos, sin, rows, self.places)
        if last is None:
            return mla_prefill(q, rows, self.plan, c.scale, c.mla.rope).flatten(1)
        q = q.index_select(0, last)
        return mla_decode(q, rows, self.last_plan, c.scale, c.mla.rope).flatten(1)


def encode_images(model: Model, images: Seq[tuple[Tensor, ImageLayout]]) -> Tensor | None:
    """Features [sum of tokens, F] in the images' order, the tower run on bounded batches."""
    features: list[Tensor] = []
    batch: list[tuple[Tensor, ImageLayout]] = []
    tokens = 0
    for pixels, layout in images:
        if batch and tokens + layout.num_tokens > MAX_IMAGE_TOKENS:
            features.append(_encode(model, batch))
            batch, tokens = [], 0
        batch.append((pixels, layout))
        tokens += layout.num_tokens
    if batch:
        features.append(_encode(model, batch))
    if not features:
        return None
    return features[0] if len(features) == 1 else torch.cat(features)


def _encode(model: Model, batch: list[tuple[Tensor, ImageLayout]]) -> Tensor:
    return model.encode_images([pixels for pixels, _ in batch], [layout for _, layout in batch])


def image_places(pieces: Seq[Piece]) -> np.ndarray:
    """Rows of the packed batch that the images' features fill, in the order of the images."""
    rows, base = [np.zeros(0, np.int64)], 0
    for piece in pieces:
        for image, _ in piece.images:
            first = base + image.start - piece.start
            rows.append(np.arange(first, first + image.layout.num_tokens, dtype=np.int64))
        base += piece.num_tokens
    return np.concatenate(rows)


def prefill(
    model: Model,
    cache: KVCache,
    pieces: Seq[Piece],
    features: Tensor | None,
    cross: CrossCache | None = None,
) -> Tensor:
    """Compute the pieces' keys and values; return logits [n, V] of those that have a sequence."""
    device = model.device
    tokens = np.concatenate([p.tokens[p.start : p.stop] for p in pieces]).astype(np.int64)
    positions = np.concatenate([p.positions[:, p.start : p.stop] for p in pieces], 1)
    places = np.concatenate([np.arange(p.num_tokens) + p.extent.start for p in pieces])
    runs, ends, segments, base = [], [], [], 0
    for piece in pieces:
        own = (*piece.earlier, (piece.extent.start, piece.num_tokens))
        spans = image_spans(model, piece.tokens[piece.start : piece.stop])
        runs.append(Run(base, piece.num_tokens, own, spans))
        base += piece.num_tokens
        if piece.sequence is not None:
            ends.append(base - 1)
            segments.append(own)
    last = to_device(torch.tensor(ends, dtype=torch.int64), device)
    gathered = None
    if cache.float8:
        runs, rows = gather_runs(runs)
        gathered = upload(rows, device)
    where = None if features is None else upload(image_places(pieces), device)
    x = model.embed(upload(tokens, device), features, where)
    attend: Attend = PrefillAttend(
        cache, upload(places.astype(np.int64), device), prefill_plan_for(runs, x),
        _last_plan(segments, device), model, gathered,
    )  # fmt: skip
    if cross is not None:
        attend = cross.prefill(attend, pieces, x)
    hidden = model.decoder(x, upload(positions.astype(np.int64), device), attend, last)
    return model.decoder.logits(hidden)


def gather_runs(runs: Seq[Run]) -> tuple[list[Run], np.ndarray]:
    """The runs over rows that stand one after another, and the places int64 [n] of these rows."""
    starts: dict[tuple[int, int], int] = {}
    places = [np.zeros(0, np.int64)]
    found, size = [], 0
    for run in runs:
        for start, length in run.segments:
            if (start, length) not in starts:
                starts[start, length] = size
                places.append(np.arange(start, start + length, dtype=np.int64))
                size += length
        segments = tuple((starts[segment], segment[1]) for segment in run.segments)
        found.append(replace(run, segments=segments))
    return found, np.concatenate(places)


def _last_plan(segments: list[tuple[tuple[int, int], ...]], device: torch.device) -> DecodePlan:
    width = max((len(s) for s in segments), default=1)
    table = [((0, 0),) * (width - len(s)) + s for s in segments]
    tensor = torch.tensor(table, dtype=torch.int32).view(-1, width, 2)
    longest = max((sum(n for _, n in s) for s in segments), default=0)
    return plan_decode(to_device(tensor, device), longest)
