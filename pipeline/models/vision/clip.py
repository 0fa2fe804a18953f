"""CLIP's image tower: square images to one feature a patch, after a chosen number of blocks.

The class token leads each image's tokens, and the last norm belongs to CLIP's own pooling, so it is
left out. Knows no resize, no tiles and no projector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.layers import LayerNorm
from pipeline.models.loading import Weights
from pipeline.models.vision.vit import Blocks, PatchEmbed, VitConfig, uniform_plan


class ClipTower:
    """Patches [B, N, 3 * patch²] of `vit.image_patches` to features [B, 1 + N, C]."""

    def __init__(self, weights: Weights, config: VitConfig, name: str = "vision_tower") -> None:
        c = self.config = config
        table = f"{name}.embeddings.position_embedding.weight"
        self.embed = PatchEmbed(weights, c, f"{name}.embeddings.patch_embedding", bias=False)
        leading = weights.take(f"{name}.embeddings.class_embedding", (c.size,))
        positions = weights.take(table, (1 + c.num_patches, c.size))
        self.leading = leading + positions[0]
        self.positions = positions[1:]
        # NOTE: spelled so in every CLIP checkpoint.
        self.norm = LayerNorm.take(weights, f"{name}.pre_layrnorm", c.size, c.eps)
        self.blocks = Blocks(weights, c, name)
        weights.drop_all(f"{name}.post_layernorm.")

    def __call__(self, patches: Tensor) -> Tensor:
        count, length = len(patches), 1 + self.config.num_patches
        x = self.embed(patches) + self.positions
        x = torch.cat([self.leading.expand(count, 1, -1), x], 1)
        x = self.blocks(self.norm(x)[0].flatten(0, 1), uniform_plan(count, length))
        return x.view(count, length, -1)
