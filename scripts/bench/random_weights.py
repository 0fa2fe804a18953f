"""Weights that no file holds: random numbers, made on the device when a model asks for them.

So a model of any published size is there in seconds, and one that only fits quantised needs no
more than that. Speed does not depend on what a model knows. Knows no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loading import WEIGHTS, Rename, Weights


class RandomWeights(Weights):
    """Every tensor that is asked for, in the order of asking; on `meta`, shapes alone.

    A `tied` model has no head of its own.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        float8: bool = False,
        tied: bool = False,
    ) -> None:
        self.device, self.dtype, self.float8 = torch.device(device), dtype, float8
        self.tied = tied
        self.taken: dict[str, tuple[int, ...]] = {}
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(0)

    def has(self, name: str) -> bool:
        return not (self.tied and name == "lm_head.weight")

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if name in self.taken:
            raise ValueError(f"{name} is taken twice")
        self.taken[name] = tuple(shape)
        if self.device.type == "meta":
            return torch.empty(tuple(shape), dtype=dtype or self.dtype, device="meta")
        return random_tensor(name, shape, dtype or self.dtype, self._generator)

    def change(self, pattern: str, change: object) -> None:
        """Changes keep a tensor's shape, and one random tensor is as good as another."""

    def drop(self, name: str) -> None: ...

    def drop_all(self, prefix: str) -> int:
        return 0

    def finish(self) -> None: ...


def random_tensor(
    name: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Norms near one, all else small, so that no activation overflows in any depth."""
    values = torch.empty(tuple(shape), dtype=dtype, device=generator.device)
    values.normal_(0.0, 0.02, generator=generator)
    return values.add_(1) if len(shape) == 1 and name.endswith("weight") else values


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a published config shares the head with the embedding; Gemma's need not say so."""
    text = config.get("text_config") or config.get("language_config") or {}
    unsaid = str(config.get("model_type")).startswith("gemma")
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", unsaid)))


@contextmanager
def installed() -> Iterator[None]:
    """Within it, every model that is loaded gets random weights."""
    token = WEIGHTS.set(_open)
    try:
        yield
    finally:
        WEIGHTS.reset(token)


def _open(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    _rename: Rename,
    float8: bool,
) -> Weights:
    return RandomWeights(device, dtype, float8, is_tied(checkpoint.config))
