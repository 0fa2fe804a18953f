"""What the engine sees of a model: images to features, tokens to embeddings, a decoder.

A family's `model.py` subclasses `Model` with its image tower. `DenseAttend` is the plainest cache,
for tests and for reading. Knows no family, no batch and no schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.fp8 import quantize_rows_reference
from pipeline.kernels.rope import rotate
from pipeline.models.decoder import Decoder, DecoderConfig, embed_tokens
from pipeline.rows import ImageLayout

if TYPE_CHECKING:
    from pipeline.models.family import Family


class Model(ABC):
    """One checkpoint on one device."""

    invariant = False  # `engine.deterministic` was proved for the family

    def __init__(self, family: Family, decoder: Decoder, embedding: Tensor) -> None:
        self.family = family
        self.decoder = decoder
        self.embedding = embedding
        self.dtype = embedding.dtype
        self.device = embedding.device

    @property
    def num_axes(self) -> int:
        return self.decoder.config.rope.num_axes

    @property
    def feature_size(self) -> int:
        """Width F of an image token's features; more than the hidden size with deepstack."""
        return self.decoder.config.hidden_size

    @abstractmethod
    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        """Return features [sum of num_tokens, F] of images uint8 [H, W, 3], in their order.

        An image has its source's size or already its layout's.
        """

    def embed(
        self, tokens: Tensor, features: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        """Return the decoder's input of `tokens` [T]; `features` [N, F] replace rows `where` [N].

        It is [T, H]. Where features are wider than H it is [T, F]: the decoder adds the further
        parts after its first layers, and they are zero for text.
        """
        x = embed_tokens(self.embedding, tokens, self.decoder.config.embed_scale)
        if features is None or where is None:
            return x
        if features.shape[1] > x.shape[1]:
            wide = x.new_zeros(len(x), features.shape[1])
            wide[:, : x.shape[1]] = x
            x = wide
        return x.index_copy_(0, where, features.to(x.dtype))


def check_token_ids(embedding: Tensor, *ids: int | None) -> None:
    """Refuse ids of a config that the token table has no rows for."""
    for token in ids:
        if token is not None and not 0 <= token < len(embedding):
            raise UserError(f"The config's token id {token} is not in its vocabulary.")


def image_spans(model: Model, tokens: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs (start, length) of image tokens that see each other; none where attention is causal."""
    if not model.decoder.config.image_spans:
        return ()
    inside = np.concatenate([[False], tokens == model.family.image_token_id, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).tolist()
    return tuple((start, stop - start) for start, stop in edges)


class DenseAttend:
    """Causal attention of one sequence in plain torch; consecutive calls continue the sequence.

    `spans` are (start, length) ranges of the first call's tokens that see each other. With
    `float8` keys and values are seen as a cache in float8 gives them back.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spans: Sequence[tuple[int, int]] = (),
        float8: bool = False,
    ) -> None:
        self.config = config
        self.spans = spans
        self.float8 = float8
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        c = self.config
        heads = qkv.view(len(qkv), -1, c.head_dim)
        turned = rotate(heads[:, : c.num_heads + c.num_kv_heads], cos, sin)
        q = turned[:, : c.num_heads]
        k = self._append(self.keys, layer, turned[:, c.num_heads :])
        if c.mla is not None:
            v = k[..., c.mla.rope :]
        else:
            v = self._append(self.values, layer, heads[:, c.num_heads + c.num_kv_heads :])
        at = torch.arange(len(k) - len(q), len(k), device=q.device)
        if last is not None:
            q, at = q[last], at[last]
        return self._attention(q, k, v, at, c.window(layer)).flatten(1)

    def _append(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        if self.float8:
            values, scale = quantize_rows_reference(new)
            new = (values.float() * scale).to(new.dtype)
        store[layer] = torch.cat([store[layer], new]) if layer in store else new
        return store[layer]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, window: int | None) -> Tensor:
        group = self.config.num_heads // self.config.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * self.config.scale
        if self.config.softcap is not None:
            scores = torch.tanh(scores / self.config.softcap) * self.config.softcap
        key = torch.arange(len(k), device=q.device)
        seen = key <= at[:, None]
        for start, length in self.spans:
            inside = (key >= start) & (key < start + length)
            seen |= inside & ((at >= start) & (at < start + length))[:, None]
        if window is not None:
            seen &= key > at[:, None] - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
        return torch.einsum("hqk,khd->qhd", weights, v)
