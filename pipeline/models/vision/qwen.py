"""The image towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches to features, many images at once.

One class; the three differ in norms, MLP, windows, a learned position table and deepstack, all told
by `TowerConfig`. Knows no resize and no decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import varlen_attention
from pipeline.kernels.rope import rotate
from pipeline.kernels.window_attention import window_attention
from pipeline.models.fp8 import quantize_block
from pipeline.models.layers import MLP, GatedMLP, LayerNorm, Linear, RMSNorm
from pipeline.models.loading import Weights
from pipeline.models.vision.grids import Grid
from pipeline.models.vision.plan import Planner, TowerPlan
from pipeline.models.vision.vit import check_heads

EPS = 1e-6
Norm = LayerNorm | RMSNorm
Mapped = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TowerConfig:
    """Sizes in values, pixels (`patch`) and units of merge x merge patches (`window`)."""

    depth: int
    size: int
    heads: int
    inner: int
    out: int
    patch: int
    temporal: int
    merge: int
    channels: int = 3
    act: str = "quick_gelu"
    gated: bool = False  # Qwen2.5: RMS norms and a gated MLP
    window: int = 0
    full_blocks: frozenset[int] = frozenset()  # of a tower with windows
    table_rows: int = 0  # Qwen3: rows of the learned position table, a square and maybe some more
    deepstack: tuple[int, ...] = ()  # Qwen3: blocks whose output is merged too, where they exist
    theta: float = 1e4  # of the rotation
    linear_names: tuple[str, str] = ("fc1", "fc2")
    merger_names: tuple[str, str, str] = ("ln_q", "mlp.0", "mlp.2")

    def __post_init__(self) -> None:
        check_heads(self.size, self.heads, multiple=4)

    @property
    def head_dim(self) -> int:
        return self.size // self.heads

    @property
    def table_side(self) -> int:
        return math.isqrt(self.table_rows)


@dataclass(slots=True)
class Block:
    """One transformer block of a tower."""

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    mlp: Mapped


def _take_norm(weights: Weights, name: str, size: int, gated: bool) -> Norm:
    kind = RMSNorm if gated else LayerNorm
    return kind.take(weights, name, size, EPS)


def _take_block(weights: Weights, name: str, c: TowerConfig) -> Block:
    mlp: Mapped
    if c.gated:
        mlp = GatedMLP.take(weights, f"{name}.mlp", c.size, c.inner, bias=True, act=c.act)
    else:
        first, second = (f"{name}.mlp.{n}" for n in c.linear_names)
        mlp = MLP.take(weights, (first, second), (c.size, c.inner, c.size), c.act)
    block = Block(
        norm1=_take_norm(weights, f"{name}.norm1", c.size, c.gated),
        qkv=Linear.take(weights, f"{name}.attn.qkv", 3 * c.size, c.size),
        proj=Linear.take(weights, f"{name}.attn.proj", c.size, c.size),
        norm2=_take_norm(weights, f"{name}.norm2", c.size, c.gated),
        mlp=mlp,
    )
    if weights.float8:
        quantize_tower_block(block)
    return block


def quantize_tower_block(block: Block) -> None:
    """Turn the block's linear maps to float8, those of a gated MLP too."""
    quantize_block(block, {"qkv": "norm1", "mlp": "norm2"})


class Merger:
    """Joins the patches of a unit into one image token; `wide_norm` norms the unit as a whole."""

    def __init__(
        self, weights: Weights, name: str, config: TowerConfig, wide_norm: bool = False
    ) -> None:
        norm, first, second = (f"{name}.{n}" for n in config.merger_names)
        self.unit = config.size * config.merge**2
        self.wide_norm = wide_norm
        normed = self.unit if wide_norm else config.size
        self.norm = _take_norm(weights, norm, normed, config.gated)
        self.mlp = MLP.take(weights, (first, second), (self.unit, self.unit, config.out), "gelu")

    def __call__(self, x: Tensor) -> Tensor:
        if self.wide_norm:
            return self.mlp(self.norm(x.view(-1, self.unit))[0])
        return self.mlp(self.norm(x)[0].view(-1, self.unit))


class QwenTower:
    """Patches [N, 3 * temporal * patch²] in merge order to features [N / merge², out * (1 + k)]."""

    def __init__(self, weights: Weights, config: TowerConfig, name: str = "visual") -> None:
        c = self.config = config
        self.embed = self._take_embed(weights, name)
        self.table = None
        if c.table_side:
            self.table = weights.take(f"{name}.pos_embed.weight", (c.table_rows, c.size))
        self.blocks = [_take_block(weights, f"{name}.blocks.{i}", c) for i in range(c.depth)]
        self.merger = Merger(weights, f"{name}.merger", c)
        self.deep = self._take_deep(weights, f"{name}.deepstack_merger_list")
        steps = torch.arange(0, c.head_dim // 2, 2, dtype=torch.float32)
        inv_freq = 1.0 / (c.theta ** (steps / (c.head_dim // 2)))
        self.inv_freq = inv_freq.to(weights.device)
        self.planner = Planner(c.merge, self.inv_freq, c.window, c.table_side)

    def _take_deep(self, weights: Weights, name: str) -> dict[int, Merger]:
        """Mergers by their block; a checkpoint may hold some for blocks that it has not."""
        deep: dict[int, Merger] = {}
        for i, block in enumerate(self.config.deepstack):
            if block in range(self.config.depth) and block not in deep:
                deep[block] = Merger(weights, f"{name}.{i}", self.config, wide_norm=True)
            else:
                weights.drop_all(f"{name}.{i}.")
        return deep

    def _take_embed(self, weights: Weights, name: str) -> Linear:
        c = self.config
        shape = (c.size, c.channels, c.temporal, c.patch, c.patch)
        weight = weights.take(f"{name}.patch_embed.proj.weight", shape).flatten(1)
        bias = f"{name}.patch_embed.proj.bias"
        return Linear(weight, weights.take(bias, (c.size,)) if c.table_side else None)

    def __call__(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        plan = self.planner.plan(grids)
        x = self.embed(patches)
        if self.table is not None:
            x = x + self._table_positions(plan).to(x.dtype)
        x = self._reorder(x, plan.order)
        cos, sin = self._angles(plan)
        deep = []
        normed, x = self.blocks[0].norm1(x)
        for index, block in enumerate(self.blocks):
            normed, x = block.norm2(
                block.proj(self._attend(index, block, normed, cos, sin, plan)), x
            )
            out = block.mlp(normed)
            if index + 1 < len(self.blocks) and index not in self.deep:
                normed, x = self.blocks[index + 1].norm1(out, x)
                continue
            x = x + out
            if index in self.deep:
                deep.append(self.deep[index](x))
            if index + 1 < len(self.blocks):
                normed, x = self.blocks[index + 1].norm1(x)
        merged = self.merger(x)
        if plan.inverse is not None:
            merged = merged.index_select(0, plan.inverse)
        return torch.cat([merged, *deep], 1) if deep else merged

    def _table_positions(self, plan: TowerPlan) -> Tensor:
        assert self.table is not None
        assert plan.taps is not None
        assert plan.tap_weights is not None
        return (self.table[plan.taps] * plan.tap_weights[:, :, None]).sum(1)

    def _angles(self, plan: TowerPlan) -> tuple[Tensor, Tensor]:
        """Rows turn the first half of a head's frequencies, columns the second."""
        angles = plan.positions.T[:, :, None].float() * self.inv_freq
        angles = angles.reshape(len(angles), -1)
        return angles.cos(), angles.sin()

    def _reorder(self, x: Tensor, order: Tensor | None) -> Tensor:
        """Move whole units of `x` [N, ...]."""
        if order is None:
            return x
        return x.view(len(order), -1).index_select(0, order).view(x.shape)

    def _attend(
        self, index: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor, plan: TowerPlan
    ) -> Tensor:
        c = self.config
        qkv, scale = block.qkv(x), c.head_dim**-0.5
        if plan.windows is not None and index not in c.full_blocks:
            return window_attention(qkv, cos, sin, plan.windows, c.heads, scale)
        heads = qkv.view(len(qkv), 3 * c.heads, c.head_dim)
        q, k = rotate(heads[:, : 2 * c.heads], cos, sin).split(c.heads, dim=1)
        return varlen_attention(q, k, heads[:, 2 * c.heads :], plan.images, scale).flatten(1)
