"""Multi-head latent attention: projections around a cache of one compressed row a token.

A row is the rotated key part that all heads share, then the latent from which keys and values
come. Queries are brought to the latent's space ("absorbed"), so attention reads rows and nothing
is decompressed; the output leaves that space again. Knows no cache. Source: DeepSeek-AI,
"DeepSeek-V2" (2024), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.mla_pack import pack_row
from pipeline.models.fp8 import quantize_block
from pipeline.models.layers import Linear, RMSNorm
from pipeline.models.loading import Weights
from pipeline.models.rope import yarn_growth

NORM_EPS = 1e-6  # of the latents' norms, whatever the config says of the others


@dataclass(frozen=True)
class MlaConfig:
    """Widths in values: of a head's plain, rotated and value parts, and of the latents."""

    plain: int
    rope: int
    value: int
    rank: int
    q_rank: int | None = None  # of the query's own latent, where it has one

    @property
    def row(self) -> int:
        """Values that the cache keeps a token."""
        return self.rope + self.rank

    @property
    def query(self) -> int:
        return self.plain + self.rope


def mla_scale(c: MlaConfig, rope: Mapping[str, Any]) -> float:
    """What multiplies query·key; grows with a stretched context (YaRN)."""
    factor, all_dim = float(rope.get("factor") or 1.0), float(rope.get("mscale_all_dim") or 0.0)
    return c.query**-0.5 * yarn_growth(factor, all_dim) ** 2


def halves(size: int) -> list[int]:
    """The order that turns interleaved rotary pairs into two halves."""
    return [*range(0, size, 2), *range(1, size, 2)]


@dataclass(slots=True)
class MlaQuery:
    """Hidden states [T, H] to packed [T, (heads + 1) * row]: absorbed queries, then the row.

    The rotated parts stand first and are not rotated yet.
    """

    config: MlaConfig
    heads: int
    joined: Linear  # queries (or their latent), and the row
    norm: RMSNorm  # of the row's latent
    absorb: Tensor  # [heads, plain, rank]
    q_norm: RMSNorm | None = None
    q_up: Linear | None = None  # from the query's latent

    def __call__(self, x: Tensor) -> Tensor:
        c = self.config
        joined = self.joined(x)
        q = joined[:, : -c.row]
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q.contiguous())[0])
        q = q.unflatten(1, (self.heads, c.query))
        packed = x.new_empty(len(x), self.heads + 1, c.row)
        latent = packed[:, :-1, c.rope :].transpose(0, 1)
        torch.bmm(q[..., c.rope :].transpose(0, 1), self.absorb, out=latent)
        pack_row(packed, q[..., : c.rope], joined[:, -c.row :], self.norm.weight, self.norm.eps)
        return packed.flatten(1)

    def quantize(self) -> None:
        quantize_block(self, {})


@dataclass(slots=True)
class MlaOutput:
    """Heads' latents [T, heads * rank] to hidden states."""

    values: Tensor  # [heads, rank, value]
    out: Linear

    def __call__(self, x: Tensor) -> Tensor:
        heads, rank, value = self.values.shape
        latent = x.view(len(x), heads, rank).transpose(0, 1)
        wide = x.new_empty(len(x), heads, value)
        torch.bmm(latent, self.values, out=wide.transpose(0, 1))
        return self.out(wide.flatten(1))

    def quantize(self) -> None:
        quantize_block(self, {})


def _rope_first(weight: Tensor, c: MlaConfig, heads: int) -> Tensor:
    """Rows of each head [plain, rope] to [rope in halves, plain]."""
    rows = weight.view(heads, c.query, -1)
    turned = rows[:, c.plain :][:, halves(c.rope)]
    return torch.cat([turned, rows[:, : c.plain]], 1).flatten(0, 1)


def take_mla(
    weights: Weights, name: str, size: int, heads: int, c: MlaConfig
) -> tuple[MlaQuery, MlaOutput]:
    """Take one layer's attention, the rotary pairs brought from interleaved to halves."""
    row = weights.take(f"{name}.kv_a_proj_with_mqa.weight", (c.row, size))
    row = torch.cat([row[c.rank :][halves(c.rope)], row[: c.rank]])
    norm = RMSNorm.take(weights, f"{name}.kv_a_layernorm", c.rank, NORM_EPS)
    up = weights.take(f"{name}.kv_b_proj.weight", (heads * (c.plain + c.value), c.rank))
    keys, values = up.view(heads, -1, c.rank).split([c.plain, c.value], dim=1)
    q_norm = q_up = None
    if c.q_rank is None:
        q = weights.take(f"{name}.q_proj.weight", (heads * c.query, size))
        q = _rope_first(q, c, heads)
    else:
        q = weights.take(f"{name}.q_a_proj.weight", (c.q_rank, size))
        q_norm = RMSNorm.take(weights, f"{name}.q_a_layernorm", c.q_rank, NORM_EPS)
        wide = weights.take(f"{name}.q_b_proj.weight", (heads * c.query, c.q_rank))
        q_up = Linear(_rope_first(wide, c, heads).contiguous())
    joined = Linear(torch.cat([q, row]))
    query = MlaQuery(c, heads, joined, norm, keys.contiguous(), q_norm, q_up)
    out = Linear.take(weights, f"{name}.o_proj", size, heads * c.value, bias=False)
    return query, MlaOutput(values.transpose(1, 2).contiguous(), out)
