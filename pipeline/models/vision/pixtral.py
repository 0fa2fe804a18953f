"""Pixtral's image tower: patches of images of any size to one feature a patch.

Rotary positions by row and column, RMS norms, a gated MLP and no class token; images stand packed
in one row and see themselves only. Knows no resize and no projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan, plan_attention, varlen_attention
from pipeline.kernels.rope import rotate
from pipeline.kernels.transfer import upload
from pipeline.models.layers import GatedMLP, Linear, RMSNorm
from pipeline.models.loading import Weights
from pipeline.models.vision.plan import KEPT_PLANS
from pipeline.models.vision.vit import check_heads

EPS = 1e-5
Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class PixtralConfig:
    """Sizes in values and pixels."""

    depth: int
    size: int
    heads: int
    inner: int
    patch: int
    theta: float = 1e4
    act: str = "silu"
    channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.size // self.heads


@dataclass(slots=True)
class Block:
    """One block's weights."""

    norm1: RMSNorm
    qkv: Linear
    out: Linear
    norm2: RMSNorm
    mlp: GatedMLP


def _take_block(weights: Weights, name: str, c: PixtralConfig) -> Block:
    parts = [f"{name}.attention.{part}_proj" for part in "qkv"]
    return Block(
        norm1=RMSNorm.take(weights, f"{name}.attention_norm", c.size, EPS),
        qkv=Linear.merged(weights, parts, [c.size] * 3, c.size, bias=False),
        out=Linear.take(weights, f"{name}.attention.o_proj", c.size, c.size, bias=False),
        norm2=RMSNorm.take(weights, f"{name}.ffn_norm", c.size, EPS),
        mlp=GatedMLP.take(weights, f"{name}.feed_forward", c.size, c.inner, False, c.act),
    )


class PixtralTower:
    """Patches [T, 3 * patch²] of images with `grids` to features [T, C]."""

    def __init__(self, weights: Weights, config: PixtralConfig, name: str = "vision_tower") -> None:
        c = self.config = config
        check_heads(c.size, c.heads, multiple=4)
        shape = (c.size, c.channels, c.patch, c.patch)
        self.embed = Linear(weights.take(f"{name}.patch_conv.weight", shape).flatten(1))
        self.norm = RMSNorm.take(weights, f"{name}.ln_pre", c.size, EPS)
        self.blocks = [_take_block(weights, f"{name}.layers.{i}", c) for i in range(c.depth)]
        steps = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        frequencies = 1.0 / c.theta**steps
        # Rows turn every second frequency from the first on, columns the others.
        self.inv_freq = torch.stack([frequencies[0::2], frequencies[1::2]]).to(weights.device)
        self._plan = lru_cache(KEPT_PLANS)(self._make_plan)

    def __call__(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        positions, plan = self._plan(tuple(grids))
        angles = (positions.float()[:, :, None] * self.inv_freq).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        x = self.norm(self.embed(patches))[0]
        out = None
        for block in self.blocks:
            normed, x = block.norm1(x, out)
            attended = self._attend(block, normed, cos, sin, plan)
            normed, x = block.norm2(block.out(attended), x)
            out = block.mlp(normed)
        return x if out is None else x + out

    def _attend(
        self, block: Block, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan
    ) -> Tensor:
        c = self.config
        heads = block.qkv(x).view(len(x), 3 * c.heads, c.head_dim)
        q, k = rotate(heads[:, : 2 * c.heads], cos, sin).split(c.heads, dim=1)
        scale = c.head_dim**-0.5
        return varlen_attention(q, k, heads[:, 2 * c.heads :], plan, scale).flatten(1)

    def _make_plan(self, grids: tuple[Grid, ...]) -> tuple[Tensor, AttentionPlan]:
        """Rows and columns of all patches [T, 2], and who sees whom."""
        device = self.inv_freq.device
        places = [np.indices(grid).reshape(2, -1).T for grid in grids]
        positions = upload(np.concatenate(places).astype(np.int32), device)
        return positions, plan_attention([rows * columns for rows, columns in grids], device)
