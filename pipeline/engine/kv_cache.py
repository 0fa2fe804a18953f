"""Keys and values of all layers: one flat row of token places a KV head.

With latent attention a token has one compressed row a layer, which is key and value. Rows may be
float8, each with a scale of its own. Place 0 is the trash place: lanes without work write there and
nothing reads it. Knows no sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.cached_rows import CachedRows
from pipeline.kernels.fp8 import FP8, Quantized
from pipeline.models.family import cached_bytes

NUM_TRASH = 1


class KVCache:
    """`keys(layer)` and `values(layer)` are [Hk, N, D]; a segment of a head lies contiguous."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        num_places: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        latent: bool = False,
        float8: bool = False,
    ) -> None:
        parts = 1 if latent else 2
        shape = (num_layers, parts, num_kv_heads, num_places + NUM_TRASH, head_dim)
        assert not (latent and float8), "the family says so before"
        # NOTE: zeros, because the trash place must never hold a NaN.
        self.data = torch.zeros(shape, dtype=FP8 if float8 else dtype, device=device)
        self.scales = torch.zeros((*shape[:-1], 1), device=device) if float8 else None
        self.num_places = num_places

    @property
    def float8(self) -> bool:
        return self.scales is not None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def keys(self, layer: int) -> CachedRows:
        return self._part(layer, 0)

    def values(self, layer: int) -> CachedRows:
        return self._part(layer, 1)

    def _part(self, layer: int, part: int) -> CachedRows:
        values = self.data[layer, part]
        return values if self.scales is None else Quantized(values, self.scales[layer, part])

    def rows(self, layer: int) -> Tensor:
        """The compressed rows [N, D] of latent attention."""
        return self.data[layer, 0, 0]

    @staticmethod
    def bytes_per_place(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
        latent: bool = False,
        float8: bool = False,
    ) -> int:
        rows = (1 if latent else 2) * num_layers * num_kv_heads
        return rows * cached_bytes(head_dim, itemsize, float8)
