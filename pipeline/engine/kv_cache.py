"""Keys and values of all layers: one flat row of token places a KV head.

With latent attention a token has one compressed row a layer, which is key and value. Place 0 is the
trash place: lanes without work write there and nothing reads it. Knows no sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    ) -> None:
        parts = 1 if latent else 2
        shape = (num_layers, parts, num_kv_heads, num_places + NUM_TRASH, head_dim)
        # NOTE: zeros, because the trash place must never hold a NaN.
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_places = num_places

    def keys(self, layer: int) -> Tensor:
        return self.data[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self.data[layer, 1]

    def rows(self, layer: int) -> Tensor:
        """The compressed rows [N, D] of latent attention."""
        return self.data[layer, 0, 0]

    @staticmethod
    def bytes_per_place(
        num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int, latent: bool = False
    ) -> int:
        return (1 if latent else 2) * num_layers * num_kv_heads * head_dim * itemsize
