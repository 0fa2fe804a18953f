"""Decoder layers that attend to an image's states, not to earlier tokens (Llama 3.2 Vision).

Such a layer's queries come from the tokens, its keys and values from the states, once an image; its
two branches are scaled by gates. Who sees which states is the caller's (`Attend`). Knows no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.models.fp8 import quantize_block
from pipeline.models.layers import GatedMLP, Linear, RMSNorm
from pipeline.models.loading import Weights


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a cross-attention layer."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str


@dataclass(slots=True)
class Queries:
    """Tokens to queries [T, Hq * D], each head normalised."""

    linear: Linear
    norm: RMSNorm

    def __call__(self, x: Tensor) -> Tensor:
        heads = self.linear(x).view(len(x), -1, len(self.norm.weight))
        return self.norm(heads)[0].flatten(1)


@dataclass(slots=True)
class Scaled:
    """A map whose result a gate scales."""

    inner: Callable[[Tensor], Tensor]
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.gate * self.inner(x)


@dataclass(slots=True)
class StateKeys:
    """Image states to keys and values."""

    linear: Linear  # keys, then values
    norm: RMSNorm

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> keys and values [T, Hk, D]."""
        both = self.linear(states).view(len(states), 2, -1, len(self.norm.weight))
        return self.norm(both[:, 0])[0], both[:, 1]


@dataclass(slots=True)
class CrossParts:
    """What a cross-attention layer has in the places of a plain layer's parts."""

    queries: Queries
    out: Scaled
    mlp: Scaled
    keys: StateKeys

    @classmethod
    def take(cls, weights: Weights, name: str, s: Shape) -> CrossParts:
        attention = f"{name}.cross_attn"
        q_size, kv_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
        parts = [f"{attention}.{part}_proj" for part in "kv"]
        norms = [
            RMSNorm.take(weights, f"{attention}.{part}_norm", s.head_dim, s.eps) for part in "qk"
        ]
        gates = [
            weights.take(f"{name}.cross_attn_{part}_gate", (1,)).tanh() for part in ("attn", "mlp")
        ]
        queries = Linear.take(weights, f"{attention}.q_proj", q_size, s.hidden, bias=False)
        keys = Linear.merged(weights, parts, [kv_size, kv_size], s.hidden, bias=False)
        out = Linear.take(weights, f"{attention}.o_proj", s.hidden, q_size, bias=False)
        mlp = GatedMLP.take(weights, f"{name}.mlp", s.hidden, s.inner, False, s.act)
        return cls(
            Queries(queries, norms[0]),
            Scaled(out, gates[0]),
            Scaled(mlp, gates[1]),
            StateKeys(keys, norms[1]),
        )


def quantize_cross(layer: Any) -> None:
    """Turn the maps of a cross-attention layer to float8; those of the states stay as they are."""
    for part, name in ((layer.qkv, "linear"), (layer.out, "inner"), (layer.mlp, "inner")):
        holder = _Holder(getattr(part, name))
        quantize_block(holder, {})
        setattr(part, name, holder.mlp if part is layer.mlp else holder.out)


class _Holder:
    """One map under the names that `quantize_block` looks for."""

    def __init__(self, map: Any) -> None:
        self.out = self.mlp = map
