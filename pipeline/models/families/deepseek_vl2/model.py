"""DeepSeek-VL2 on a device: tensor names, tower, projector and decoder settings.

Knows no chat template and no choice of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.kernels.transfer import upload
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder
from pipeline.models.deepseek import deepseek_config
from pipeline.models.families.deepseek_vl2 import spec, tiles
from pipeline.models.layers import MLP, Linear, activation
from pipeline.models.loading import Weights
from pipeline.models.vision.siglip import TIMM, SiglipTower
from pipeline.models.vision.views import render_views
from pipeline.models.vision.vit import VitConfig, image_patches
from pipeline.rows import ImageLayout

RENAME = ((r"^language\.", ""),)


class Projector:
    """Features [n, grid², C] to [n, ceil(grid / ratio)², D]: neighbours joined, then an MLP."""

    def __init__(self, weights: Weights, config: Mapping[str, Any], grid: int) -> None:
        p = config
        self.ratio, self.grid = p["downsample_ratio"], grid
        self.size = p["input_dim"]
        if p["depth"] != 2 or p["mlp_ratio"] != 1:
            raise UserError("config.json: only a projector of depth 2 and mlp_ratio 1 is known")
        unit, out = self.size * self.ratio**2, p["n_embed"]
        first = Linear.take(weights, "projector.layers.0", out, unit)
        # NOTE: columns come channel by channel; here the channels of a neighbour stand together.
        columns = first.weight.view(out, self.size, -1).transpose(1, 2).reshape(out, unit)
        second = Linear.take(weights, "projector.layers.2", out, out)
        self.mlp = MLP(Linear(columns.contiguous(), first.bias), second, activation("gelu"))

    def __call__(self, features: Tensor) -> Tensor:
        ratio, side = self.ratio, -(-self.grid // self.ratio)
        x = features.view(len(features), self.grid, self.grid, self.size)
        missing = side * ratio - self.grid
        if missing:
            x = functional.pad(x, (0, 0, 0, missing, 0, missing))
        x = x.view(-1, side, ratio, side, ratio, self.size).transpose(2, 3)
        return self.mlp(x.reshape(len(features), side * side, -1))


class DeepseekVL2(Model):
    """A DeepSeek-VL2 checkpoint on one device."""

    def __init__(
        self,
        family: spec.DeepseekVL2,
        decoder: Decoder,
        embedding: Tensor,
        tower: SiglipTower,
        projector: Projector,
        marks: Tensor,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.tower = tower
        self.projector = projector
        self.marks = marks  # [2, D]: the end of a row, the separator of the views
        self.mean, self.std = family.image_mean, family.image_std
        self.side, self.tile_rows = family.side, family.tile_rows
        self.global_first = family.global_first
        self._index = lru_cache(maxsize=256)(self._make_index)

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        pictures = torch.cat(
            [
                self._tiles(view)
                for image, layout in zip(images, layouts, strict=True)
                for view in render_views(image, layout)
            ]
        )
        c = self.tower.config
        patches = image_patches(pictures, c.patch, self.mean, self.std, self.dtype)
        features = self.projector(self.tower(patches)).flatten(0, 1)
        grids = tuple((layout.grid[1], layout.grid[2]) for layout in layouts)
        return torch.cat([features, self.marks]).index_select(0, self._index(grids))

    def _tiles(self, view: Tensor) -> Tensor:
        """uint8 [H, W, 3] to its square tiles [n, side, side, 3], row by row."""
        rows, columns = view.shape[0] // self.side, view.shape[1] // self.side
        cut = view.view(rows, self.side, columns, self.side, 3).transpose(1, 2)
        return cut.reshape(-1, self.side, self.side, 3)

    def _make_index(self, grids: tuple[tuple[int, int], ...]) -> Tensor:
        count = sum(1 + rows * columns for rows, columns in grids) * self.tile_rows**2
        index = tiles.block_index(self.tile_rows, grids, count, self.global_first)
        return upload(index, self.device)


def build(checkpoint: Checkpoint, family: spec.DeepseekVL2, weights: Weights) -> DeepseekVL2:
    """Take the model's tensors from `weights`."""
    config = checkpoint.config
    text, v = spec.text_config(config), spec.vision_config(config)
    p = spec.projector_config(config)
    settings = deepseek_config(text, tied=bool(text.get("tie_word_embeddings", False)))
    hidden = settings.hidden_size
    if p["n_embed"] != hidden or v["image_size"] != family.side:
        raise UserError("config.json: tower, projector, processor and decoder do not fit together")
    embedding = weights.take("model.embed_tokens.weight", (settings.vocab_size, hidden))
    vit = VitConfig(
        v["layers"], v["width"], v["heads"], v["inner"], v["patch_size"], v["image_size"]
    )
    tower = SiglipTower(weights, vit, "vision", names=TIMM)
    projector = Projector(weights, p, vit.grid)
    marks = [weights.take(name, (hidden,)) for name in ("image_newline", "view_seperator")]
    decoder = Decoder.take(weights, settings, embedding)
    return DeepseekVL2(family, decoder, embedding, tower, projector, torch.stack(marks))
