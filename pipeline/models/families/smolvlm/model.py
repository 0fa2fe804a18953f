"""SmolVLM2 on a device: SigLIP on tiles, pixel shuffle, one projection, a Llama decoder.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.transfer import upload
from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, common_config, llama_biases
from pipeline.models.families.smolvlm import spec
from pipeline.models.layers import Linear
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.siglip import SiglipTower
from pipeline.models.vision.views import render_view
from pipeline.models.vision.vit import image_patches, vit_config
from pipeline.rows import ImageLayout

MAX_TILES = 64  # of one pass of the tower
RENAME = ((r"^model\.text_model\.", "model."),)


class SmolVLM(Model):
    """A SmolVLM2 checkpoint on one device."""

    def __init__(
        self,
        family: spec.SmolVLM,
        decoder: Decoder,
        embedding: Tensor,
        tower: SiglipTower,
        project: Linear,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.tower, self.project = tower, project
        self.shuffle, self.grid = family.shuffle, family.grid
        self.tile, self.mean, self.std = family.tile, family.image_mean, family.image_std
        self._blocks = lru_cache(64)(self._make_blocks)

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        tiles = [self._tiles(i, layout) for i, layout in zip(images, layouts, strict=True)]
        passes = torch.cat(tiles).split(MAX_TILES)
        features = torch.cat([self._features(pixels) for pixels in passes])
        ids, where = self._blocks(tuple(layouts))
        return self.embedding.index_select(0, ids).index_copy_(0, where, features)

    def _features(self, pixels: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] -> [n * tokens of a tile, H]."""
        patches = image_patches(pixels, self.tower.config.patch, self.mean, self.std, self.dtype)
        return self.project(self._shuffled(self.tower(patches))).flatten(0, 1)

    def _tiles(self, image: Tensor, layout: ImageLayout) -> Tensor:
        """uint8 [n, T, T, 3]: the tiles row by row, then the whole image as one."""
        for view in layout.views[:2]:
            image = render_view(image, view)
        if len(layout.views) == 2:
            return image[None]
        _, rows, columns = layout.grid
        cut = image.view(rows, self.tile, columns, self.tile, 3).transpose(1, 2)
        return torch.cat([cut.flatten(0, 1), render_view(image, layout.views[2])[None]])

    def _shuffled(self, x: Tensor) -> Tensor:
        """Square groups of patches as one: [B, N, C] -> [B, N / s², s² C]."""
        s, side = self.shuffle, self.grid
        grouped = x.view(len(x), side // s, s, side // s, s, -1).transpose(2, 3)
        return grouped.reshape(len(x), (side // s) ** 2, -1)

    def _make_blocks(self, layouts: tuple[ImageLayout, ...]) -> tuple[Tensor, Tensor]:
        """Ids of the images' blocks, and which of them features replace."""
        ids = np.concatenate([self.family.image_tokens(n) for n in layouts]).astype(np.int64)
        where = np.flatnonzero(ids == self.family.image_token_id)
        return upload(ids, self.device), upload(where, self.device)


def build(checkpoint: Checkpoint, family: spec.SmolVLM, weights: Weights) -> SmolVLM:
    """Take the model's tensors from `weights`."""
    text, vision = spec.text_config(checkpoint.config), spec.vision_config(checkpoint.config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    tied = bool(checkpoint.config.get("tie_word_embeddings", False))
    config = common_config(text, rope_config(text, head_dim), tied=tied, **llama_biases(text))
    sizes = vit_config(vision)
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    check_token_ids(embedding, family.image_token_id)
    decoder = Decoder.take(weights, config, embedding)
    tower = SiglipTower(weights, sizes, "model.vision_model")
    tower.see_grid(family.grid)
    projection, into = "model.connector.modality_projection.proj", sizes.size * family.shuffle**2
    project = Linear.take(weights, projection, config.hidden_size, into, bias=False)
    return SmolVLM(family, decoder, embedding, tower, project)
