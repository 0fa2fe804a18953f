"""Pixtral on a device: tensor names of both layouts, tower, projector, the ends of rows.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.resize import resize
from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config
from pipeline.models.families.pixtral import spec
from pipeline.models.layers import Linear
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.pixtral import PixtralConfig, PixtralTower
from pipeline.models.vision.vit import image_patches
from pipeline.rows import ImageLayout

_TOWER, _LAYER = r"^vision_encoder\.transformer\.layers\.(\d+)\.", r"^layers\.(\d+)\."
# Mistral's own names, then transformers' of today and of before.
RENAME = (
    (_TOWER + r"attention\.w([qkvo])\.", r"vision_tower.layers.\1.attention.\2_proj."),
    (_TOWER + r"feed_forward\.w1\.", r"vision_tower.layers.\1.feed_forward.gate_proj."),
    (_TOWER + r"feed_forward\.w2\.", r"vision_tower.layers.\1.feed_forward.down_proj."),
    (_TOWER + r"feed_forward\.w3\.", r"vision_tower.layers.\1.feed_forward.up_proj."),
    (_TOWER, r"vision_tower.layers.\1."),
    (r"^vision_encoder\.", "vision_tower."),
    (r"^vision_language_adapter\.w_in\.", "projector.0."),
    (r"^vision_language_adapter\.w_out\.", "projector.2."),
    (_LAYER + r"attention\.w([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (_LAYER + r"feed_forward\.w1\.", r"model.layers.\1.mlp.gate_proj."),
    (_LAYER + r"feed_forward\.w2\.", r"model.layers.\1.mlp.down_proj."),
    (_LAYER + r"feed_forward\.w3\.", r"model.layers.\1.mlp.up_proj."),
    (_LAYER + r"attention_norm\.", r"model.layers.\1.input_layernorm."),
    (_LAYER + r"ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^(?:model\.)?vision_tower\.transformer\.", "vision_tower."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Mistral's decoder, of either layout."""
    text = spec.text_config(config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    window, layers = text.get("sliding_window"), text["num_hidden_layers"]
    windowed = window is not None and window < text["max_position_embeddings"]
    return common_config(
        text,
        rope_config(text, head_dim),
        windows=(window,) * layers if windowed else (),
        tied=text["tie_word_embeddings"],
    )


class Pixtral(Model):
    """A Pixtral checkpoint on one device."""

    invariant = True

    def __init__(
        self,
        family: spec.Pixtral,
        decoder: Decoder,
        embedding: Tensor,
        tower: PixtralTower,
        projector: tuple[Linear, Linear],
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.original = family.original
        self.mean, self.std = family.image_mean, family.image_std
        self.tower = tower
        self.projector = projector
        self.break_row = embedding[family.break_token_id][None]
        self.end_row = embedding[family.end_token_id][None]

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        patches = [self._patches(i, x) for i, x in zip(images, layouts, strict=True)]
        grids = [layout.grid[1:] for layout in layouts]
        first, second = self.projector
        features = second(F.gelu(first(self.tower(torch.cat(patches), grids))))
        blocks = features.split([rows * columns for rows, columns in grids])
        return torch.cat(
            [self._with_ends(block, *grid) for block, grid in zip(blocks, grids, strict=True)]
        )

    def _patches(self, image: Tensor, layout: ImageLayout) -> Tensor:
        """Normalised patches [N, 3 * patch²] of an image at its layout's size."""
        size = sized if self.original else resize
        pixels = size(image, layout.height, layout.width)[None]
        return image_patches(pixels, self.tower.config.patch, self.mean, self.std, self.dtype)[0]

    def _with_ends(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """One image's block: each row of features, then its end."""
        ends = torch.cat([self.break_row.expand(rows - 1, -1), self.end_row])
        lines = features.view(rows, columns, -1)
        return torch.cat([lines, ends[:, None]], 1).flatten(0, 1)


def sized(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] to float32 of that size, as Mistral's code resizes: cubic, not antialiased.

    Its own is OpenCV's, which torch's equals up to float32's rounding.
    """
    wide = image.permute(2, 0, 1)[None].float()
    if wide.shape[2:] != (height, width):
        wide = F.interpolate(wide, (height, width), mode="bicubic", align_corners=False)
    return wide[0].permute(1, 2, 0)


def _unweave(weight: Tensor, heads: int) -> Tensor:
    """Rows of heads whose neighbours turn together to heads whose halves do."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _unweave_all(weights: Weights, config: DecoderConfig, tower: PixtralConfig) -> None:
    own, image = r"^model\.layers\.\d+\.self_attn", r"^vision_tower\.layers\.\d+\.attention"
    weights.change(rf"{own}\.q_proj\.", partial(_unweave, heads=config.num_heads))
    weights.change(rf"{own}\.k_proj\.", partial(_unweave, heads=config.num_kv_heads))
    weights.change(rf"{image}\.[qk]_proj\.", partial(_unweave, heads=tower.heads))


def build(checkpoint: Checkpoint, family: spec.Pixtral, weights: Weights) -> Pixtral:
    """Take the model's tensors from `weights`."""
    config, t = decoder_config(checkpoint.config), family.tower
    tower = PixtralConfig(t.blocks, t.size, t.heads, t.inner, t.patch, t.theta, t.act)
    c = checkpoint.config
    bias = c.get("multimodal_projector_bias", True)
    if family.original:
        bias = c["vision_encoder"].get("adapter_bias", True)
        _unweave_all(weights, config, tower)
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    check_token_ids(embedding, family.image_token_id, family.break_token_id, family.end_token_id)
    first = Linear.take(weights, "projector.0", config.hidden_size, t.size, bias)
    second = Linear.take(weights, "projector.2", config.hidden_size, config.hidden_size, bias)
    decoder = Decoder.take(weights, config, embedding)
    return Pixtral(family, decoder, embedding, PixtralTower(weights, tower), (first, second))
