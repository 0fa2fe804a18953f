"""MiniCPM's resampler: learned queries read a picture's patch features into a fixed number.

Keys carry the patch's row and column as sines and cosines, values do not. Pictures of one size are
taken together as a dense rectangle. Knows no tower and no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan, dense_attention
from pipeline.models.layers import LayerNorm, Linear
from pipeline.models.loading import Weights

HEAD_SIZE = 128
EPS = 1e-6


@lru_cache(maxsize=8)
def axis_table(length: int, size: int) -> np.ndarray:
    """Sines, then cosines, of one axis: float32 [length, size]."""
    # NOTE: float32 throughout, in the reference's order of operations.
    frequencies = np.arange(size // 2, dtype=np.float32)
    frequencies /= size / 2.0
    frequencies = (1.0 / 10000**frequencies).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


@dataclass(frozen=True, slots=True)
class Places:
    """Row and column of each patch, int64 [N]."""

    rows: Tensor
    columns: Tensor


class Resampler:
    """Patch features [N, into] of several pictures to [pictures * queries, size]."""

    def __init__(
        self, weights: Weights, name: str, queries: int, size: int, into: int, side: int
    ) -> None:
        self.size, self.heads = size, size // HEAD_SIZE
        self.kv = Linear.take(weights, f"{name}.kv_proj", size, into, bias=False)
        self.kv_norm = LayerNorm.take(weights, f"{name}.ln_kv", size, EPS)
        weight = weights.take(f"{name}.attn.in_proj_weight", (3 * size, size)).split(size)
        bias = weights.take(f"{name}.attn.in_proj_bias", (3 * size,)).split(size)
        self.key, self.value = Linear(weight[1], bias[1]), Linear(weight[2], bias[2])
        self.out = Linear.take(weights, f"{name}.attn.out_proj", size, size)
        self.norm = LayerNorm.take(weights, f"{name}.ln_post", size, EPS)
        # The reference multiplies by it as it stands, without a transpose.
        self.project = Linear(weights.take(f"{name}.proj", (size, size)).T.contiguous())
        # The queries are the same for every picture.
        learned = weights.take(f"{name}.query", (queries, size))
        normed = LayerNorm.take(weights, f"{name}.ln_q", size, EPS)(learned)[0]
        self.query = self._heads(Linear(weight[0], bias[0])(normed))
        self.table = self._table(side)

    def __call__(self, x: Tensor, places: Places, plan: AttentionPlan) -> Tensor:
        """The plan's runs are the pictures, those of one length side by side."""
        x = self.kv_norm(self.kv(x))[0]
        key = self._heads(self.key(x + self._positions(places)))
        value = self._heads(self.value(x))
        parts = [
            self._read(key[r.start :], value[r.start :], r.count, r.length) for r in plan.rectangles
        ]
        read = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.project(self.norm(self.out(read))[0])

    def ensure(self, side: int) -> None:
        """Grow the tables to pictures of `side` patches."""
        if side > len(self.table):
            self.table = self._table(2 * side)

    def _read(self, key: Tensor, value: Tensor, count: int, length: int) -> Tensor:
        shape = (count, length)
        k, v = (t[: count * length].unflatten(0, shape).transpose(1, 2) for t in (key, value))
        q = self.query.transpose(0, 1).expand(count, -1, -1, -1)
        out = dense_attention(q, k, v)
        return out.transpose(1, 2).reshape(-1, self.size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.heads, -1)

    def _positions(self, places: Places) -> Tensor:
        """Columns in the first half, rows in the second."""
        columns = self.table.index_select(0, places.columns)
        return torch.cat([columns, self.table.index_select(0, places.rows)], 1)

    def _table(self, length: int) -> Tensor:
        table = torch.from_numpy(axis_table(length, self.size // 2))
        return table.to(self.query.device, self.query.dtype)
