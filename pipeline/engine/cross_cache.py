"""Keys and values of image states, for cross-attention: computed once, shared, given back.

An image's states lie beside each other, those of a prompt's images too, so a token's view is one
range; states of padding, which only tokens before the first image read, go when the prefill is
done. Ordinary models have no such cache. Knows no schedule and no lane's end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.extents import Extent, ExtentPool
from pipeline.engine.kv_cache import NUM_TRASH, KVCache
from pipeline.kernels.cached_rows import CachedRows, put_rows
from pipeline.kernels.decode_attention import (
    DecodePlan,
    choose_splits,
    decode_attention,
    plan_decode,
)
from pipeline.kernels.prefill_attention import PrefillPlan, Run, prefill_attention, prefill_plan_for
from pipeline.kernels.transfer import to_device, upload
from pipeline.rows import ImageLayout, PlacedImage

if TYPE_CHECKING:
    from pipeline.engine.schedule import Piece
    from pipeline.engine.sequence import Sequence
    from pipeline.models.base import Model
    from pipeline.models.decoder import Attend

IMAGES_AT_ONCE = 4  # of one pass of the tower


@dataclass(slots=True, eq=False)
class States:
    """Where the states of a prompt's images lie; `kept` has a user for each sequence."""

    kept: Extent
    padding: Extent
    images: tuple[PlacedImage, ...]

    def shared(self) -> States:
        """The same states, for one user more."""
        self.kept.num_users += 1
        return self

    def at(self, number: int) -> int:
        """First place of an image's states."""
        return self.kept.start + sum(i.layout.num_states for i in self.images[:number])

    def runs(self, start: int, stop: int) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """What the tokens `[start, stop)` see: (first, end, segments), consecutive.

        A token sees the images right before it, up to the last text between two images; a token
        before all images sees every state, padding too, as the official layers compute it.
        """
        everything = (
            (self.kept.start, self.kept.length),
            (self.padding.start, self.padding.length),
        )
        found = [(0, self.images[0].start, tuple(s for s in everything if s[1]))]
        first = 0
        for number, image in enumerate(self.images):
            last = number + 1 == len(self.images)
            if number and image.start != self.images[number - 1].start + 1:
                first = number
            place = self.at(first)
            length = self.at(number) + image.layout.num_states - place
            end = stop if last else self.images[number + 1].start
            found.append((image.start, end, ((place, length),)))
        clipped = [(max(a, start), min(b, stop), segments) for a, b, segments in found]
        return [run for run in clipped if run[0] < run[1]]


class StatePool:
    """Lends the places of `States`."""

    def __init__(self, num_places: int) -> None:
        self.pool = ExtentPool(NUM_TRASH, num_places)

    def take(self, images: Seq[PlacedImage]) -> States | None:
        """Places for all states of `images`, or None where they do not fit now."""
        kept = self.pool.take(sum(i.layout.num_states for i in images))
        if kept is None:
            return None
        padding = self.pool.take(sum(i.layout.num_padding_states for i in images))
        if padding is None:
            self.pool.give(kept)
            return None
        return States(kept, padding, tuple(images))

    def could_take(self, images: Seq[PlacedImage]) -> bool:
        """Whether the states of `images` would fit an empty cache."""
        layouts = [i.layout for i in images]
        return self.pool.size >= sum(x.num_states + x.num_padding_states for x in layouts)

    def give(self, states: States) -> None:
        """One user less; the last one frees the states."""
        self.pool.give(states.kept)

    def give_padding(self, states: States) -> None:
        """The prefill that read the padding's states has run."""
        self.pool.give(states.padding)


class CrossCache:
    """The cache with its lanes' views, for one model."""

    def __init__(self, model: Model, num_places: int, num_lanes: int) -> None:
        c = model.decoder.config
        self.model = model
        self.layers = {layer: number for number, layer in enumerate(c.cross_layers)}
        plain = [layer for layer in range(c.num_layers) if layer not in self.layers]
        self.plain = {layer: number for number, layer in enumerate(plain)}
        self.cache = KVCache(
            len(c.cross_layers), c.num_kv_heads, num_places, c.head_dim, model.dtype, model.device
        )
        self.pool = StatePool(num_places)
        self.views = torch.zeros(num_lanes, 1, 2, dtype=torch.int32, device=model.device)
        self.longest = 1  # view so far

    # 1. states

    def fill(self, pieces: Seq[Piece]) -> None:
        """Encode the pieces' images and keep their keys and values."""
        jobs: dict[int, list[tuple[Any, ImageLayout, np.ndarray]]] = {}
        for piece in (piece for piece in pieces if piece.images):
            for (image, pixels), where in zip(piece.images, _places(piece.states), strict=True):
                same = jobs.setdefault(image.layout.num_states, [])
                same.append((pixels.image, image.layout, where))
        for same in jobs.values():
            for first in range(0, len(same), IMAGES_AT_ONCE):
                self._fill(same[first : first + IMAGES_AT_ONCE])

    def _fill(self, jobs: Seq[tuple[Any, ImageLayout, np.ndarray]]) -> None:
        images, layouts, where = zip(*jobs, strict=True)
        states = self.model.encode_images(list(images), list(layouts))
        places = upload(np.concatenate(where), self.model.device)
        for layer, number in self.layers.items():
            cross = self.model.decoder.layers[layer].cross
            assert cross is not None
            keys, values = cross(states)
            put_rows(self.cache.keys(number), places, keys)
            put_rows(self.cache.values(number), places, values)

    # 2. prefill

    def prefill(self, inner: Attend, pieces: Seq[Piece], like: Tensor) -> PrefillCross:
        """The attention of one packed batch `like`; `inner` is that of the plain layers."""
        runs: list[Run] = []
        views, base = [], 0
        seeing, hidden = np.zeros(len(like), bool), np.ones(len(like), bool)
        for piece in pieces:
            states = piece.states
            for first, end, segments in states.runs(piece.start, piece.stop) if states else ():
                at, length = base + first - piece.start, end - first
                runs.append(Run(at, length, segments, spans=((0, length),)))
                hidden[at : at + length] = False
                seeing[at : at + length] = first >= states.images[0].start
            base += piece.num_tokens
            if piece.sequence is not None:
                views.append(view_of(states, piece.stop))
        device = self.model.device
        return PrefillCross(
            self, inner, upload(seeing, device), self._view_plan(views),
            prefill_plan_for(runs, like) if runs else None,
            upload(hidden, device) if hidden.any() else None,
        )  # fmt: skip

    def _view_plan(self, views: Seq[tuple[int, int]]) -> DecodePlan:
        table = torch.tensor(views, dtype=torch.int32).view(-1, 1, 2)
        longest = max((length for _, length in views), default=1)
        return plan_decode(to_device(table, self.model.device), longest)

    # 3. steps

    def start(self, rows: Tensor, sequences: Seq[Sequence]) -> None:
        """Tell the lanes `rows` what their sequences see."""
        views = [view_of(s.states, s.request.num_tokens) for s in sequences]
        self.longest = max(self.longest, *(length for _, length in views))
        table = torch.tensor(views, dtype=torch.int32).view(-1, 1, 2)
        self.views[rows] = to_device(table, self.model.device)

    def decode(self, inner: Attend, rows: Tensor) -> StepCross:
        """The attention of one step of the lanes `rows`."""
        views = self.views[rows]
        c = self.model.decoder.config
        splits = choose_splits(len(rows), c.num_kv_heads, self.longest, self.model.device)
        plan = plan_decode(views, self.longest, splits)
        return StepCross(self, inner, views[:, 0, 1] > 0, plan)


class StepCross:
    """`Attend` of one step: plain layers go on to `inner`, the others read the lanes' views."""

    def __init__(self, owner: CrossCache, inner: Attend, seeing: Tensor, views: DecodePlan) -> None:
        self.owner = owner
        self.inner = inner
        self.seeing = seeing  # bool [T]: the token comes after an image
        self.views = views

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        owner = self.owner
        if layer in owner.plain:
            return self.inner(owner.plain[layer], qkv, cos, sin, last)
        number = owner.layers[layer]
        q = qkv.unflatten(-1, (owner.model.decoder.config.num_heads, -1))
        return self._cross(q, owner.cache.keys(number), owner.cache.values(number), last).flatten(1)

    def shown(self, last: Tensor | None) -> Tensor:
        """Which rows see an image, bool [n, 1]; the others' MLP gives nothing."""
        seeing = self.seeing if last is None else self.seeing.index_select(0, last)
        return seeing[:, None]

    def _cross(self, q: Tensor, k: CachedRows, v: CachedRows, last: Tensor | None) -> Tensor:
        q = q if last is None else q.index_select(0, last)
        return decode_attention(q, k, v, self.views, self.owner.model.decoder.config.scale)


class PrefillCross(StepCross):
    """`Attend` of one batch; `hidden` rows belong to prompts without images."""

    def __init__(
        self,
        owner: CrossCache,
        inner: Attend,
        seeing: Tensor,
        views: DecodePlan,
        plan: PrefillPlan | None,
        hidden: Tensor | None,
    ) -> None:
        super().__init__(owner, inner, seeing, views)
        self.plan = plan
        self.hidden = hidden

    def _cross(self, q: Tensor, k: CachedRows, v: CachedRows, last: Tensor | None) -> Tensor:
        if last is not None:
            return super()._cross(q, k, v, last)
        if self.plan is None:
            return torch.zeros_like(q)
        rows = cast("tuple[Tensor, Tensor]", (k, v))  # image states are never float8
        scale = self.owner.model.decoder.config.scale
        out = prefill_attention(q.contiguous(), *rows, self.plan, scale)
        return out if self.hidden is None else out.masked_fill_(self.hidden[:, None, None], 0)


def view_of(states: States | None, position: int) -> tuple[int, int]:
    """The range that tokens from `position` on see, after all images; empty without images."""
    if states is None:
        return 0, 0
    return states.runs(position - 1, position)[0][2][0]


def _places(states: States) -> list[np.ndarray]:
    """Cache places of each image's states, in the tower's order: used tiles, then padding."""
    found, padding = [], states.padding.start
    for number, image in enumerate(states.images):
        start, layout = states.at(number), image.layout
        kept = np.arange(start, start + layout.num_states)
        rest = np.arange(padding, padding + layout.num_padding_states)
        padding += layout.num_padding_states
        found.append(np.concatenate([kept, rest]))
    return found


def cross_cache_for(model: Model, num_places: int, num_lanes: int) -> CrossCache | None:
    """The cache of a model that has layers of cross-attention; None for others."""
    if not model.decoder.config.cross_layers:
        return None
    return CrossCache(model, num_places, num_lanes)
