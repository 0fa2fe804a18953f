"""Helpers of the engine tests: requests on random pictures, an engine, transformers' greedy truth.

Builds everything from the small checkpoints of `tests.helpers`; no feeder process takes part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.engine.build import build_engine
from pipeline.feeder import END
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.planner import Planner
from pipeline.rows import (
    Completion,
    EncodedImage,
    PlacedImage,
    Request,
    RequestKey,
    SamplingParams,
    Turn,
)
from pipeline.settings import LabelSettings
from pipeline.tokenizer import Tokenizer

CARD_SHARE = 2 << 30  # bytes of cache: several test processes work beside each other on one card
TEXTS = ("Describe this.", "What is left of the blue house?", "Count the birds, then stop.", "Hm")


def picture(seed: int, width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:height, :width].copy()


@dataclass
class Bench:
    """One checkpoint with what turns questions into requests."""

    settings: LabelSettings
    checkpoint: Checkpoint
    family: Any
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: Path, **engine: Any) -> Bench:
        """With few lanes: they and the model's context bound the cache, however large the card."""
        engine = {"device": "cpu", "decode_slots": 8, "prefill_tokens": 256} | engine
        settings = LabelSettings.model_validate(
            {"model": {"id": str(folder)}, "input": {"path": "-"}, "engine": engine}
        )
        checkpoint = Checkpoint.open(settings.model)
        family = family_for(checkpoint, settings.model)
        return cls(settings, checkpoint, family, Tokenizer(checkpoint, family.control))

    def with_model(self, **changes: Any) -> Bench:
        """The same questions with other settings of the model: dtype, quantization."""
        model = self.settings.model.model_copy(update=changes)
        return replace(self, settings=self.settings.model_copy(update={"model": model}))

    def request(
        self,
        row: int,
        text: str,
        pictures: Sequence[np.ndarray],
        prompt: str = "p",
        **sampling: Any,
    ) -> Request:
        turn = Turn("user", (*range(len(pictures)), text))
        return self.request_of(row, [turn], pictures, prompt, **sampling)

    def request_of(
        self,
        row: int,
        turns: Sequence[Turn],
        pictures: Sequence[np.ndarray],
        prompt: str = "p",
        **sampling: Any,
    ) -> Request:
        """As `request`, of a whole conversation."""
        count = len(pictures)
        layouts = [self.family.layout(p.shape[1], p.shape[0], count) for p in pictures]
        tokens, starts = self.family.tokenize(turns, layouts, self.tokenizer)
        images = []
        for pixels, layout, start in zip(pictures, layouts, starts, strict=True):
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            PIXELS[digest] = pixels
            image = EncodedImage(digest, pixels.shape[1], pixels.shape[0], "", 0, 0)
            images.append(PlacedImage(image, layout, start))
        positions, following = self.family.positions(tokens, images)
        stops = sampling.pop("stop_token_ids", self.family.eos_token_ids)
        schema = sampling.pop("schema", None)
        params = SamplingParams(stop_token_ids=stops, **({"max_new_tokens": 12} | sampling))
        key = RequestKey("s", row, prompt)
        return Request(key, tokens, tuple(images), positions, following, params, schema)

    def engine(self) -> Any:
        engine = build_engine(self.settings, self.checkpoint, self.family, self.tokenizer)
        held = engine.cache.nbytes
        assert held <= CARD_SHARE, f"a cache of {held >> 20} MiB; name fewer decode_slots"
        return engine

    def run(self, requests: Sequence[Request], engine: Any = None) -> dict[Any, Completion]:
        planner = Planner(self.settings.engine, whole_images=self.family.images_reach_back)
        items = planner.plan(requests).items
        found = list((engine or self.engine()).run(ListFeed(items)))
        keys = [c.key for c in found]
        assert len(set(keys)) == len(keys) == len(requests), "each request ends exactly once"
        return {c.key: c for c in found}


PIXELS: dict[bytes, Any] = {}


class ListFeed:
    """A feed whose images are at hand; `PIXELS` may hold a RowError for a picture."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = list(items)
        self.num_released = 0

    def get(self, timeout: float | None) -> Any:
        if not self.items:
            return END
        item = self.items.pop(0)
        images = tuple(PIXELS[i.image.digest] for i in item.images)
        return SimpleNamespace(item=item, images=images, release=self._release)

    def _release(self) -> None:
        self.num_released += 1


def outputs(found: dict[Any, Completion]) -> dict[Any, tuple[int, ...]]:
    return {key: c.output_ids for key, c in found.items()}


def questions(bench: Bench, rows: int = 6, **sampling: Any) -> list[Request]:
    """Rows of odd sizes with two questions each, a text-only row, and one of two images."""
    sizes = [(61, 45), (140, 56), (33, 90), (112, 112), (200, 70), (28, 28)]
    made = []
    for row in range(rows):
        pixels = picture(row, *sizes[row % len(sizes)])
        for number, text in enumerate(TEXTS[: 2 + row % 2]):
            made.append(bench.request(row, text, [pixels], f"p{number}", **sampling))
    made.append(bench.request(rows, TEXTS[3], [], **sampling))
    pair = [picture(90, 84, 56), picture(91, 56, 120)]
    made.append(bench.request(rows + 1, TEXTS[0], pair, **sampling))
    return made
