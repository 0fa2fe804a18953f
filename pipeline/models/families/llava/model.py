"""LLaVA on a device: tensor names of both layouts, tower, projector, the packing of tiles.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.resize import resize
from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config, sliding_windows
from pipeline.models.families.llava.config import LlavaConfig
from pipeline.models.families.llava.spec import Llava as LlavaFamily
from pipeline.models.families.llava.tiles import pooled
from pipeline.models.families.llava.tower_sizes import TowerSizes, stock_tower
from pipeline.models.layers import Linear, activation
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.clip import ClipTower
from pipeline.models.vision.siglip import SiglipTower
from pipeline.models.vision.views import render_views, resize_frames
from pipeline.models.vision.vit import VitConfig, image_patches
from pipeline.rows import ImageLayout

# The original layout, then transformers' of today, then what its older versions saved.
RENAME = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^(model\.)?image_newline$", "image_newline"),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
# The tower's own checkpoint, where it is not part of the model's.
STOCK_RENAME = ((r"^vision_model\.", "vision_tower."),)
MAX_TILES = 32  # that the tower takes at once
Tower = ClipTower | SiglipTower


def decoder_config(config: LlavaConfig, tied: bool) -> DecoderConfig:
    """The decoder's settings: Llama's, Mistral's or Qwen2's."""
    text = config.text
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    # NOTE: transformers' Mistral and Qwen2 read no such key.
    llama = config.decoder == "llama"
    bias = llama and bool(text.get("attention_bias", False))
    return common_config(
        text,
        rope_config(text, head_dim),
        qkv_bias=bias or config.decoder == "qwen2",
        out_bias=bias,
        mlp_bias=llama and bool(text.get("mlp_bias", False)),
        windows=_windows(config),
        tied=tied,
    )


def _windows(config: LlavaConfig) -> tuple[int | None, ...]:
    text, layers = config.text, config.text["num_hidden_layers"]
    size = text.get("sliding_window")
    used = config.decoder == "mistral" or text.get("use_sliding_window")
    if size is None or not used or size >= text["max_position_embeddings"]:
        return ()
    first = text.get("max_window_layers", 28) if config.decoder == "qwen2" else 0
    local = [i >= first for i in range(layers)]
    if config.decoder == "qwen2" and text.get("layer_types"):
        local = [kind == "sliding_attention" for kind in text["layer_types"]]
    return sliding_windows(size, local)


class Projector:
    """Linear maps with an activation between them."""

    def __init__(self, weights: Weights, config: LlavaConfig) -> None:
        hidden, sizes = config.text["hidden_size"], [config.tower.size]
        sizes += [hidden] * max(1, config.projector_layers)
        self.act = activation(config.projector_act)
        self.layers = [
            Linear.take(weights, name, out, into, config.projector_bias)
            for name, into, out in zip(_names(config), sizes, sizes[1:], strict=False)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(self.act(x))
        return x


def _names(config: LlavaConfig) -> list[str]:
    if config.projector_layers == 0:
        return ["projector"]
    return [f"projector.{2 * i}" for i in range(config.projector_layers)]


class Llava(Model):
    """A LLaVA checkpoint on one device."""

    invariant = True

    def __init__(
        self,
        family: LlavaFamily,
        decoder: Decoder,
        embedding: Tensor,
        tower: Tower,
        projector: Projector,
        newline: Tensor | None,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.config = family.config
        self.mean, self.std = family.image_mean, family.image_std
        self.tower = tower
        self.projector = projector
        self.newline = newline

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        tiles = [self._tiles(i, x) for i, x in zip(images, layouts, strict=True)]
        features = self.tile_features(torch.cat(tiles))
        blocks, start = [], 0
        for layout, own in zip(layouts, tiles, strict=True):
            blocks += self._pack(features[start : start + len(own)], layout)
            start += len(own)
        return torch.cat(blocks)

    def tile_features(self, tiles: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to the decoder's input [B, N, H]."""
        return torch.cat([self._some_features(part) for part in tiles.split(MAX_TILES)])

    def _some_features(self, tiles: Tensor) -> Tensor:
        patch = self.config.tower.patch
        x = self.tower(image_patches(tiles, patch, self.mean, self.std, self.dtype))
        return self.projector(x[:, self.config.skipped :])

    def _tiles(self, image: Tensor, layout: ImageLayout) -> Tensor:
        """The square pictures of one image, uint8 [n, S, S, 3]: the whole one first."""
        side = self.config.tower.side
        if layout.clip is not None:
            return resize_frames(image, layout)
        if not layout.views:
            return resize(image, side, side)[None]
        whole, *canvas = render_views(image, layout)
        if not canvas:
            return whole[None]
        cut = canvas[0].unflatten(1, (-1, side)).unflatten(0, (-1, side))
        return torch.cat([whole[None], cut.transpose(1, 2).flatten(0, 1)])

    def _pack(self, features: Tensor, layout: ImageLayout) -> list[Tensor]:
        """One image's block in parts, of the features [n, N, H] of its pictures."""
        if layout.clip is not None:
            return self._pack_frames(features, layout)
        whole, hidden = features[0], features.shape[-1]
        if len(features) == 1:
            ends_line = layout.num_tokens > len(whole)
            return [whole, self._newlines(1)] if ends_line else [whole]
        patches, side = self.config.tower.grid, self.config.tower.side
        down, across = layout.height // side, layout.width // side
        grid = features[1:].view(down, across, patches, patches, hidden).transpose(1, 2)
        grid = grid.reshape(down * patches, across * patches, hidden)
        rows, columns = layout.grid[1:]
        top, left = (len(grid) - rows) // 2, (grid.shape[1] - columns) // 2
        grid = self._pool(grid[top : top + rows, left : left + columns])
        rows, columns = grid.shape[:2]
        lines = torch.cat([grid, self._newlines(rows)[:, None]], 1)
        return [whole, lines.flatten(0, 1)]

    def _pack_frames(self, features: Tensor, layout: ImageLayout) -> list[Tensor]:
        """A video's block: the pooled features [frames, N, H], then the newline."""
        frames = features.unflatten(1, (self.config.tower.grid, -1))
        pooled = pool_features(frames, (layout.grid[1], layout.grid[2])).flatten(0, 2)
        ends_line = layout.num_tokens > len(pooled)
        return [pooled, self._newlines(1)] if ends_line else [pooled]

    def _pool(self, grid: Tensor) -> Tensor:
        """Features [rows, columns, H], fewer where they are more than `max_tiles` hold."""
        shape = (grid.shape[0], grid.shape[1])
        size = pooled(shape, self.config.tower.grid, self.config.max_tiles)
        return grid if size == shape else pool_features(grid[None], size)[0]

    def _newlines(self, count: int) -> Tensor:
        assert self.newline is not None
        return self.newline.expand(count, -1)


def pool_features(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features [B, rows, columns, H] interpolated to `size` rows and columns."""
    planes = features.permute(0, 3, 1, 2)
    return F.interpolate(planes, size, mode="bilinear").permute(0, 2, 3, 1)


def _take_tower(checkpoint: Checkpoint, sizes: TowerSizes, weights: Weights) -> Tower:
    """The tower of the checkpoint, or of the one that it names."""
    config = VitConfig(
        sizes.depth, sizes.size, sizes.heads, sizes.inner, sizes.patch, sizes.side, sizes.act,
        sizes.eps,
    )  # fmt: skip
    inside = weights.has("vision_tower.embeddings.position_embedding.weight")
    if inside or "mm_vision_tower" not in checkpoint.config:
        return _build_tower(sizes, config, weights)
    files = stock_tower(checkpoint).weight_files()
    stock = Weights(files, weights.device, weights.dtype, STOCK_RENAME)
    tower = _build_tower(sizes, config, stock)
    stock.drop_all("")  # the text half, and what the tower does not use
    stock.finish()
    return tower


def _build_tower(sizes: TowerSizes, config: VitConfig, weights: Weights) -> Tower:
    if sizes.kind == "clip":
        return ClipTower(weights, config)
    return SiglipTower(weights, config, final_norm=False)


def build(checkpoint: Checkpoint, family: LlavaFamily, weights: Weights) -> Llava:
    """Take the model's tensors from `weights`."""
    c = family.config
    stated: Any = checkpoint.config.get("mm_hidden_size", c.tower.size)
    if stated != c.tower.size:
        raise UserError(f"mm_hidden_size is {stated}, the image tower's width {c.tower.size}.")
    config = decoder_config(c, tied=c.tied or not weights.has("lm_head.weight"))
    shape = (config.vocab_size, config.hidden_size)
    embedding = weights.take("model.embed_tokens.weight", shape)
    video = getattr(family, "video_token_id", None)
    check_token_ids(embedding, family.image_token_id, video)
    newline = weights.take("image_newline", shape[1:]) if c.unpads else None
    if newline is None:
        weights.drop("image_newline")
    return Llava(
        family,
        Decoder.take(weights, config, embedding),
        embedding,
        _take_tower(checkpoint, c.tower, weights),
        Projector(weights, c),
        newline,
    )
