"""MiniCPM-V 2.6 on a device: its tensor names, NaViT tower, resampler and Qwen2 decoder.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.transfer import upload
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config
from pipeline.models.families.minicpm import spec
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.navit import to_patches
from pipeline.models.vision.resampler import Resampler
from pipeline.models.vision.siglip import SiglipTower
from pipeline.models.vision.slices import SlicePlanner
from pipeline.models.vision.views import render_views, resize_frames
from pipeline.models.vision.vit import vit_config
from pipeline.rows import ImageLayout

RENAME = (
    (r"^llm\.model\.", "model."),
    (r"^llm\.lm_head\.", "lm_head."),
)
_KEPT_TABLES = 64


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Qwen2's settings, which stand at the top of the config."""
    if config.get("use_sliding_window", False):
        raise UserError("config.json: use_sliding_window is not supported")
    rope = rope_config(config, config["hidden_size"] // config["num_attention_heads"])
    tied = bool(config.get("tie_word_embeddings", False))
    return common_config(config, rope, qkv_bias=True, tied=tied)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a checkpoint of the family holds."""

    decoder: Decoder
    embedding: Tensor
    tower: SiglipTower
    resampler: Resampler


def take_parts(checkpoint: Checkpoint, family: spec.MiniCPM, weights: Weights) -> Parts:
    config = decoder_config(checkpoint.config)
    sizes = vit_config(checkpoint.config["vision_config"], spec.tower_depth(checkpoint.config))
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    resampler = Resampler(
        weights, "resampler", family.num_queries, config.hidden_size, sizes.size, sizes.grid
    )
    decoder = Decoder.take(weights, config, embedding)
    return Parts(decoder, embedding, SiglipTower(weights, sizes, "vpm"), resampler)


class MiniCPM(Model):
    """A MiniCPM-V 2.6 checkpoint on one device."""

    def __init__(self, family: spec.MiniCPM, parts: Parts) -> None:
        super().__init__(family, parts.decoder, parts.embedding)
        self.tower, self.resampler = parts.tower, parts.resampler
        self.patch, self.queries = family.patch_size, family.num_queries
        self.mean, self.std = family.image_mean, family.image_std
        self.planner = SlicePlanner(self.patch, self.tower.config.grid, self.device)
        self._blocks = lru_cache(_KEPT_TABLES)(self._make_blocks)

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        views = [
            to_patches(view, self.patch, self.mean, self.std).to(self.dtype)
            for image, layout in zip(images, layouts, strict=True)
            for view in _views(image, layout)
        ]
        features = self._encode(torch.cat(views), layouts)
        ids, where = self._blocks(tuple(layouts))
        return self.embedding.index_select(0, ids).index_copy_(0, where, features)

    def _encode(self, patches: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
        """Features of all pictures, in the plan's order."""
        parts = []
        for each in self.planner.plan(layouts).passes:
            self.resampler.ensure(each.side)
            x = self.tower.packed(
                patches.index_select(0, each.order), each.table_rows, each.attention
            )
            parts.append(self.resampler(x, each.places, each.attention))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _make_blocks(self, layouts: tuple[ImageLayout, ...]) -> tuple[Tensor, Tensor]:
        """Ids of the images' blocks, and which of them the pictures' features replace."""
        assert isinstance(self.family, spec.MiniCPM)
        blocks = [self.family.image_tokens(layout) for layout in layouts]
        ids = np.concatenate(blocks).astype(np.int64)
        slots = np.flatnonzero(ids == self.family.image_token_id).reshape(-1, self.queries)
        where = slots[self.planner.plan(layouts).numbers].reshape(-1)
        return upload(ids, self.device), upload(where, self.device)


def _views(image: Tensor, layout: ImageLayout) -> list[Tensor]:
    """The pictures of an image, or of a video's frames one after the other.

    Workers hand a video's pictures over made; in tests they may be whole frames still.
    """
    if layout.clip is None:
        return render_views(image, layout)
    if not layout.views:
        return list(resize_frames(image, layout))
    if image.dim() == 4:
        return [view for frame in image for view in render_views(frame, layout)]
    sizes = [(height, width) for height, width, _ in layout.packed]
    parts = image.split([height * width for height, width in sizes], 1)
    shaped = [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]
    return [view[number] for number in range(len(image)) for view in shaped]


def build(checkpoint: Checkpoint, family: spec.MiniCPM, weights: Weights) -> MiniCPM:
    """Take the model's tensors from `weights`."""
    return MiniCPM(family, take_parts(checkpoint, family, weights))
