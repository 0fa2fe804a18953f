"""MoonViT, Kimi-VL's image tower: pictures of any even patch grid, packed, each seeing itself.

A learned table of positions is resized to each grid (bicubic), and queries and keys are rotated by
column and row in turn. Knows no resize of pictures and no projector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.layers import LayerNorm, Linear
from pipeline.models.loading import Weights
from pipeline.models.vision.grids import Grid
from pipeline.models.vision.plan import Planner
from pipeline.models.vision.vit import BlockNames, Blocks, PatchEmbed, VitConfig, check_heads

NAMES = BlockNames("blocks", "norm0", ("wqkv",), "wo", "norm1", ("mlp.fc0", "mlp.fc1"))
THETA = 10000.0


class MoonVit:
    """Patches [N, 3 * patch²] in merge order to features [N, C] in that order."""

    def __init__(
        self, weights: Weights, config: VitConfig, table: tuple[int, int], merge: int, name: str
    ) -> None:
        c = self.config = config
        check_heads(c.size, c.heads, multiple=4)
        self.merge = merge
        self.embed = PatchEmbed(weights, c, f"{name}.patch_embed.proj", bias=True)
        shape = (*table, c.size)
        positions = weights.take(f"{name}.patch_embed.pos_emb.weight", shape, torch.float32)
        self.table = positions.permute(2, 0, 1)[None].contiguous()
        self.blocks = Blocks(weights, c, f"{name}.encoder", NAMES, more=False)
        for block in self.blocks.blocks:
            block.qkv = _halved(block.qkv, c)
        self.norm = LayerNorm.take(weights, f"{name}.encoder.final_layernorm", c.size, c.eps)
        steps = torch.arange(0, c.size // c.heads, 4, dtype=torch.float32)
        inv_freq = 1.0 / (THETA ** (steps / (c.size // c.heads)))
        self.inv_freq = inv_freq.to(weights.device)
        self.planner = Planner(merge, self.inv_freq)

    def __call__(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        plan = self.planner.plan(grids)
        table = torch.cat([self._positions(grid) for grid in grids])
        x = self.embed(patches) + table.to(patches.dtype)
        return self.blocks(x, plan.images, self.norm, self._angles(plan.positions))

    def _positions(self, grid: Grid) -> Tensor:
        """The table at the grid's size, rows in merge order."""
        _, rows, columns = grid
        sized = functional.interpolate(self.table, (rows, columns), mode="bicubic")[0]
        cut = sized.view(-1, rows // self.merge, self.merge, columns // self.merge, self.merge)
        return cut.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies come in pairs: the first turned by the column, the second by the row."""
        row, column = positions.float()[:, :, None] * self.inv_freq
        angles = torch.stack([column, row], -1).flatten(1)
        return angles.cos(), angles.sin()


def _halved(qkv: Linear, c: VitConfig) -> Linear:
    """Queries' and keys' rotary pairs from interleaved to two halves."""

    def turned(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (3, c.heads, -1, 2))
        return torch.cat([heads[:2].transpose(2, 3).flatten(0, 3), heads[2].flatten(0, 2)])

    assert qkv.bias is not None
    return Linear(turned(qkv.weight), turned(qkv.bias))
