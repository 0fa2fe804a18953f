"""SigLIP's image tower, in the names of transformers or of timm: one feature a patch.

Square images are a dense batch; `packed` takes images of any size whose patches name their places
in the position table. Knows no resize, no tiles, no pooling head and no projector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionPlan
from pipeline.models.layers import LayerNorm
from pipeline.models.loading import Weights
from pipeline.models.vision.vit import (
    HF_BLOCKS,
    TIMM_BLOCKS,
    BlockNames,
    Blocks,
    PatchEmbed,
    VitConfig,
    uniform_plan,
)


@dataclass(frozen=True)
class SiglipNames:
    """How a layout calls the tower's parts; `table_axes` are the position table's extra axes."""

    embed: str = "embeddings.patch_embedding"
    table: str = "embeddings.position_embedding.weight"
    table_axes: tuple[int, ...] = ()
    norm: str = "post_layernorm"
    head: str = "head"
    blocks: BlockNames = HF_BLOCKS


HF = SiglipNames()
TIMM = SiglipNames("patch_embed.proj", "pos_embed", (1,), "norm", "attn_pool", TIMM_BLOCKS)


class SiglipTower:
    """Patches [B, N, 3 * patch²] of `vit.image_patches` to features [B, N, C]."""

    def __init__(
        self,
        weights: Weights,
        config: VitConfig,
        name: str = "vision_tower",
        final_norm: bool = True,
        names: SiglipNames = HF,
    ) -> None:
        c = self.config = config
        shape = (*names.table_axes, c.num_patches, c.size)
        self.embed = PatchEmbed(weights, c, f"{name}.{names.embed}", bias=True)
        self.table = weights.take(f"{name}.{names.table}", shape).view(-1, c.size)
        self.blocks = Blocks(weights, c, name, names.blocks)
        self.norm = None
        if final_norm:
            self.norm = LayerNorm.take(weights, f"{name}.{names.norm}", c.size, c.eps)
        else:
            weights.drop_all(f"{name}.{names.norm}.")
        weights.drop_all(f"{name}.{names.head}.")

    def see_grid(self, grid: int) -> None:
        """See squares of `grid` patches a side from now on, each at the row in which it begins.

        In float32 as SmolVLM's reference, which gives 25 patches of 25 other rows than their own.
        """
        side = self.config.grid
        begins = torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor(grid))
        edges = torch.arange(1 / side, 1.0, 1 / side)
        cells = torch.bucketize(begins.clamp(max=1.0 - 1e-6), edges, right=True)
        places = (cells[:, None] * side + cells).flatten()
        self.table = self.table.index_select(0, places.to(self.table.device))

    def __call__(self, patches: Tensor) -> Tensor:
        count, length = patches.shape[:2]
        x = (self.embed(patches) + self.table).flatten(0, 1)
        return self.blocks(x, uniform_plan(count, length), self.norm).view(count, length, -1)

    def packed(self, patches: Tensor, places: Tensor, plan: AttentionPlan) -> Tensor:
        """Patches [T, 3 * patch²] of many images, `places` [T] in the table -> [T, C]."""
        x = self.embed(patches) + self.table.index_select(0, places)
        return self.blocks(x, plan, self.norm)
