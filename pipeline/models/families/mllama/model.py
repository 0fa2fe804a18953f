"""Llama 3.2 Vision on a device: its tensor names, tower and decoder with cross-attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.transfer import to_device
from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config
from pipeline.models.families.mllama import spec
from pipeline.models.layers import Linear
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.mllama import MllamaTower, tower_config
from pipeline.models.vision.views import render_views
from pipeline.models.vision.vit import image_patches
from pipeline.rows import ImageLayout

# The hub's layout and what transformers 5 saves, to the names used here.
RENAME = (
    (r"^(model\.)?vision_model\.", "vision_model."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder's settings from a checkpoint's config."""
    text = spec.text_config(config)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    rope = rope_config(text, head_dim, default_theta=5e5)
    return common_config(text, rope, cross_layers=text["cross_attention_layers"])


class Mllama(Model):
    """A Llama 3.2 Vision checkpoint on one device."""

    def __init__(
        self,
        family: spec.Mllama,
        decoder: Decoder,
        embedding: Tensor,
        tower: MllamaTower,
        projector: Linear,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.family: spec.Mllama = family
        self.tower = tower
        self.projector = projector

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        """States [sum of num_states + num_padding_states, H], for the cross-attention layers.

        Images with the same number of tiles, in a row, run as one batch.
        """
        found, first = [], 0
        for end in range(1, len(images) + 1):
            if end == len(images) or layouts[end].num_states != layouts[first].num_states:
                found.append(self._encode(images[first:end], layouts[first:end]))
                first = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def _encode(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        family, c = self.family, self.tower.config
        tiles = [family.tiles(layout) for layout in layouts]
        used = tiles[0][0] * tiles[0][1]
        shape = (len(images), c.tiles, c.num_patches, c.patch_values)
        patches = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for number, (image, layout) in enumerate(zip(images, layouts, strict=True)):
            canvas = render_views(image, layout)[0]
            patches[number, :used] = self._patches(canvas, *tiles[number])
        options = spec.arrangements(c.tiles)
        ids = to_device(torch.tensor([options.index(t) + 1 for t in tiles]), self.device)
        states = self.tower(patches, ids, used)
        return self.projector(states).flatten(0, 2)

    def _patches(self, canvas: Tensor, rows: int, columns: int) -> Tensor:
        side, family = self.family.side, self.family
        tiles = canvas.view(rows, side, columns, side, 3).transpose(1, 2).reshape(-1, side, side, 3)
        patch = self.tower.config.patch
        return image_patches(tiles, patch, family.image_mean, family.image_std, self.dtype)


def build(checkpoint: Checkpoint, family: spec.Mllama, weights: Weights) -> Mllama:
    """Take the model's tensors from `weights`."""
    config = decoder_config(checkpoint.config)
    vision = spec.vision_config(checkpoint.config)
    sizes = tower_config(vision, spec.num_arrangements(vision))
    rows = config.vocab_size + spec.EXTRA_EMBEDDINGS
    embedding = weights.take("model.embed_tokens.weight", (rows, config.hidden_size))
    check_token_ids(embedding, family.image_token_id)
    decoder = Decoder.take(weights, config, embedding)
    tower = MllamaTower(weights, sizes, "vision_model")
    projector = Linear.take(weights, "multi_modal_projector", config.hidden_size, sizes.out)
    return Mllama(family, decoder, embedding, tower, projector)
