"""Llama 3.2 Vision's image tower: four tiles an image to states that cross-attention reads.

A local and a gated global transformer; states of some local blocks stand beside the last one's. The
tower was trained with padding in place, and its mask hides padding from padding alone: real tokens
see everything, padded ones only real ones. So unused tiles are computed too. Knows no decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.attention import dense_attention
from pipeline.models.layers import MLP, LayerNorm, Linear
from pipeline.models.loading import Weights
from pipeline.models.vision.vit import PatchEmbed, VitConfig, check_heads

MULTIPLE = 8  # a tile's tokens are padded to it
EPS = 1e-5  # of the norms around the two transformers


@dataclass(frozen=True)
class MllamaTowerConfig(VitConfig):
    """A plain transformer's sizes, with tiles; `depth` is the local one's."""

    num_global: int = 8
    tiles: int = 4
    kept: tuple[int, ...] = (3, 7, 15, 23, 30)  # local blocks whose outputs count too
    num_arrangements: int = 8

    @property
    def length(self) -> int:
        """States of a tile: its patches and one for the whole."""
        return self.num_patches + 1

    @property
    def padding(self) -> int:
        return -self.length % MULTIPLE

    @property
    def out(self) -> int:
        return self.size * (1 + len(self.kept))


def tower_config(vision: Mapping[str, Any], num_arrangements: int) -> MllamaTowerConfig:
    """Read the tower's settings."""
    depth = vision["num_hidden_layers"]
    return MllamaTowerConfig(
        depth=depth,
        size=vision["hidden_size"],
        heads=vision["attention_heads"],
        inner=vision["intermediate_size"],
        patch=vision["patch_size"],
        side=vision["image_size"],
        act=vision["hidden_act"],
        eps=float(vision["norm_eps"]),
        num_global=vision["num_global_layers"],
        tiles=vision["max_num_tiles"],
        kept=tuple(i % depth for i in vision["intermediate_layers_indices"]),
        num_arrangements=num_arrangements,
    )


class _Block:
    """A pre-norm block, its two branches scaled by gates in the global transformer."""

    def __init__(self, weights: Weights, name: str, c: MllamaTowerConfig, gated: bool) -> None:
        parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        self.heads = c.heads
        self.norm1 = LayerNorm.take(weights, f"{name}.input_layernorm", c.size, c.eps)
        self.qkv = Linear.merged(weights, parts, [c.size] * 3, c.size, bias=False)
        self.out = Linear.take(weights, f"{name}.self_attn.o_proj", c.size, c.size, bias=False)
        self.norm2 = LayerNorm.take(weights, f"{name}.post_attention_layernorm", c.size, c.eps)
        names = (f"{name}.mlp.fc1", f"{name}.mlp.fc2")
        self.mlp = MLP.take(weights, names, (c.size, c.inner, c.size), c.act)
        self.gates: tuple[Tensor, ...] = ()
        if gated:
            taken = [weights.take(f"{name}.gate_{part}", (1,)) for part in ("attn", "ffn")]
            self.gates = tuple(gate.tanh() for gate in taken)

    def __call__(self, x: Tensor, num_real: int) -> Tensor:
        """`x` [B, T, C], the first `num_real` tokens of each image no padding."""
        attended = self.out(self._attend(self.norm1(x)[0], num_real))
        x = x + (self.gates[0] * attended if self.gates else attended)
        made = self.mlp(self.norm2(x)[0])
        return x + (self.gates[1] * made if self.gates else made)

    def _attend(self, x: Tensor, num_real: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = dense_attention(q[:, :, :num_real], k, v)
        if num_real < x.shape[1]:
            few = k[:, :, :num_real], v[:, :, :num_real]
            padded = dense_attention(q[:, :, num_real:], *few)
            out = torch.cat([out, padded], 2)
        return out.transpose(1, 2).flatten(2)


class _TileTable:
    """A vector for each tile of each arrangement, scaled by a gate."""

    def __init__(self, weights: Weights, name: str, c: MllamaTowerConfig) -> None:
        rows = c.num_arrangements + 1
        table = weights.take(f"{name}.embedding.weight", (rows, c.tiles * c.size))
        self.table = (
            table.view(rows, c.tiles, 1, c.size) * weights.take(f"{name}.gate", (1,)).tanh()
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """[B] -> [B, tiles, 1, C]."""
        return self.table.index_select(0, ids)


class _Positions:
    """A tile's own position table, mixed by a gate with one for each tile of each arrangement."""

    def __init__(self, weights: Weights, name: str, c: MllamaTowerConfig) -> None:
        gate = weights.take(f"{name}.gate", (1,)).tanh()
        self.own = (1 - gate) * weights.take(f"{name}.embedding", (c.length, c.size))
        shape = (c.num_arrangements + 1, c.tiles * c.length * c.size)
        tiled = weights.take(f"{name}.tile_embedding.weight", shape)
        self.tiled = gate * tiled.view(shape[0], c.tiles, c.length, c.size)

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.own + self.tiled.index_select(0, ids)


class MllamaTower:
    """Patches of tiles to states; all images of a call use the same number of tiles."""

    def __init__(self, weights: Weights, config: MllamaTowerConfig, name: str) -> None:
        c = self.config = config
        check_heads(c.size, c.heads)
        self.embed = PatchEmbed(weights, c, f"{name}.patch_embedding", bias=False)
        self.leading = weights.take(f"{name}.class_embedding", (c.size,))
        self.positions = _Positions(weights, f"{name}.gated_positional_embedding", c)
        self.before = _TileTable(weights, f"{name}.pre_tile_positional_embedding", c)
        self.after = _TileTable(weights, f"{name}.post_tile_positional_embedding", c)
        self.norm_before = LayerNorm.take(weights, f"{name}.layernorm_pre", c.size, EPS)
        self.norm_after = LayerNorm.take(weights, f"{name}.layernorm_post", c.size, EPS)
        stem = f"{name}.transformer.layers"
        self.local = [_Block(weights, f"{stem}.{i}", c, False) for i in range(c.depth)]
        stem = f"{name}.global_transformer.layers"
        self.wide = [_Block(weights, f"{stem}.{i}", c, True) for i in range(c.num_global)]

    def __call__(self, patches: Tensor, ids: Tensor, num_tiles: int) -> Tensor:
        """Patches [B, tiles, N, 3 * patch²], zero in unused tiles -> states [B, tiles, 1 + N, out].

        `ids` [B] number the images' arrangements; the first `num_tiles` tiles are used.
        """
        c, count = self.config, len(patches)
        x = self.embed(patches) + self.before(ids)
        x = torch.cat([self.leading.expand(count, c.tiles, 1, -1), x], 2)
        x = self.norm_before(self.positions(x, ids))[0].flatten(1, 2)
        # NOTE: the padding of all tiles stands behind them, so that what is real comes first.
        x = functional.pad(x, (0, 0, 0, c.tiles * c.padding))
        real, total = num_tiles * c.length, c.tiles * c.length
        if not c.padding:
            real = total  # the official mask is then equal everywhere
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.local):
            x = block(x, real)
            if number in c.kept:
                kept[number] = x[:, :total]
        x = self.norm_after(x)[0] + self._after(ids)
        for block in self.wide:
            x = block(x, real)
        chosen = torch.stack([kept[number] for number in c.kept], -1)
        states = torch.cat([x[:, :total], chosen.flatten(2)], -1)
        return states.view(count, c.tiles, c.length, -1)

    def _after(self, ids: Tensor) -> Tensor:
        """Each token's tile vector, the padding's too."""
        c, table = self.config, self.after(ids)
        own = table.expand(-1, -1, c.length, -1).flatten(1, 2)
        return torch.cat([own, table.expand(-1, -1, c.padding, -1).flatten(1, 2)], 1)
