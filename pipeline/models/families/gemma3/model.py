"""Gemma 3 on a device: its tensor names, the pooling projector and the decoder's settings.

Five of six decoder layers see a sliding window and turn by a rope of their own; tokens of one image
see each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config, sliding_windows
from pipeline.models.families.gemma3 import spec
from pipeline.models.layers import Linear, RMSNorm
from pipeline.models.loading import Weights
from pipeline.models.rope import RopeConfig, rope_config
from pipeline.models.vision.siglip import SiglipTower
from pipeline.models.vision.views import render_views
from pipeline.models.vision.vit import VitConfig, image_patches
from pipeline.rows import ImageLayout

PICTURES_AT_ONCE = 16  # of one pass of the tower: 4,096 patches each

# The hub's layout and what transformers 5 saves, to the names used here.
RENAME = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder's settings from a checkpoint's config."""
    text = spec.text_config(config)
    wide, near = _ropes(text)
    bias = bool(text.get("attention_bias", False))
    # NOTE: as transformers, which heeds attn_logit_softcapping nowhere and the logits' cap in its
    # text model alone.
    cap = None if "text_config" in config else text.get("final_logit_softcapping")
    return common_config(
        text,
        wide,
        local_rope=near,
        windows=_windows(text),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        act=text["hidden_activation"],
        scale=text["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=cap,
        embed_scale=text["hidden_size"] ** 0.5,
        tied=bool(config.get("tie_word_embeddings", True)),
        image_spans=True,
    )


def _windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        pattern, layers = text["sliding_window_pattern"], text["num_hidden_layers"]
        near = [(i + 1) % pattern != 0 for i in range(layers)]
    else:
        near = [kind == "sliding_attention" for kind in kinds]
    return sliding_windows(text["sliding_window"], near)


def _ropes(text: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """The rope of layers that see everything, and of those with a window."""
    newer = text.get("rope_parameters") or {}
    wide = {**(newer.get("full_attention") or {}), **(text.get("rope_scaling") or {})}
    near = newer.get("sliding_attention") or {}
    thetas = text.get("rope_theta", 1e6), text.get("rope_local_base_freq", 1e4)
    found = [
        rope_config({**text, "rope_scaling": {"rope_theta": theta, **own}}, text["head_dim"])
        for theta, own in zip(thetas, (wide, near), strict=True)
    ]
    return found[0], found[1]


def tower_config(vision: Mapping[str, Any]) -> VitConfig:
    """Read the tower's settings."""
    return VitConfig(
        depth=vision["num_hidden_layers"],
        size=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        inner=vision["intermediate_size"],
        patch=vision["patch_size"],
        side=vision["image_size"],
        act=vision["hidden_act"],
        eps=float(vision["layer_norm_eps"]),
    )


class Projector:
    """Patches of an image, averaged in squares, to tokens of the decoder's width."""

    def __init__(self, weights: Weights, vision: VitConfig, tokens: int, hidden: int) -> None:
        name = "multi_modal_projector"
        norm = f"{name}.mm_soft_emb_norm"
        self.norm = RMSNorm.take(weights, norm, vision.size, vision.eps, offset=1.0)
        # NOTE: stored with its inputs first.
        weight = weights.take(f"{name}.mm_input_projection_weight", (vision.size, hidden))
        self.linear = Linear(weight.T.contiguous())
        self.grid = vision.grid
        self.side = math.isqrt(tokens)
        self.pool = vision.grid // self.side

    def __call__(self, x: Tensor) -> Tensor:
        """[B, patches, C] -> [B * tokens, H]."""
        whole = self.side * self.pool  # patches beyond are not seen
        square = x.unflatten(1, (self.grid, self.grid))[:, :whole, :whole]
        cut = square.reshape(len(x), self.side, self.pool, self.side, self.pool, -1)
        pooled = cut.mean((2, 4)).flatten(0, 2)
        return self.linear(self.norm(pooled)[0])


class Gemma3(Model):
    """A Gemma 3 checkpoint on one device; a text model has no tower."""

    def __init__(
        self,
        family: spec.Gemma3,
        decoder: Decoder,
        embedding: Tensor,
        tower: SiglipTower | None,
        projector: Projector | None,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.family: spec.Gemma3 = family
        self.tower = tower
        self.projector = projector

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        pictures = [
            view
            for image, layout in zip(images, layouts, strict=True)
            for view in render_views(image, layout)
        ]
        parts = [
            self._encode(pictures[i : i + PICTURES_AT_ONCE])
            for i in range(0, len(pictures), PICTURES_AT_ONCE)
        ]
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(pictures) == len(images):
            return features
        return self._joined(features, [len(layout.views) for layout in layouts])

    def _encode(self, pictures: list[Tensor]) -> Tensor:
        assert self.tower is not None
        assert self.projector is not None
        family, patch = self.family, self.tower.config.patch
        square = torch.stack(pictures)
        patches = image_patches(square, patch, family.image_mean, family.image_std, self.dtype)
        return self.projector(self.tower(patches))

    def _joined(self, features: Tensor, num_pictures: list[int]) -> Tensor:
        """Rows of whole blocks: the words between an image's pictures have their embeddings."""
        whole, crop = self.joints
        pictures = iter(features.split(self.family.tokens))
        rows: list[Tensor] = []
        for count in num_pictures:
            rows.append(next(pictures))
            for number in range(1, count):
                rows += [whole if number == 1 else crop, next(pictures)]
        return torch.cat(rows)

    @cached_property
    def joints(self) -> tuple[Tensor, Tensor]:
        ids = [torch.from_numpy(x.astype("int64")) for x in astuple(self.family.joints)]
        whole, crop = (self.embed(x.to(self.device)) for x in ids)
        return whole, crop


def build(checkpoint: Checkpoint, family: spec.Gemma3, weights: Weights) -> Gemma3:
    """Take the model's tensors from `weights`."""
    config = decoder_config(checkpoint.config)
    vision = spec.vision_config(checkpoint.config)
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    decoder = Decoder.take(weights, config, embedding)
    if vision is None:
        return Gemma3(family, decoder, embedding, None, None)
    check_token_ids(embedding, family.image_token_id)
    sizes = tower_config(vision)
    tokens = int(checkpoint.config.get("mm_tokens_per_image") or 256)
    projector = Projector(weights, sizes, tokens, config.hidden_size)
    return Gemma3(family, decoder, embedding, SiglipTower(weights, sizes), projector)
