"""Janus-Pro on a device: tensor names of both layouts, tower, aligner and decoder settings.

What only image generation needs is left in the files. Knows no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config, llama_biases
from pipeline.models.families.janus import spec
from pipeline.models.layers import MLP
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.siglip import TIMM, SiglipNames, SiglipTower
from pipeline.models.vision.views import render_view
from pipeline.models.vision.vit import HF_BLOCKS, VitConfig, image_patches
from pipeline.rows import ImageLayout

# Either layout's decoder and aligner to one name each.
RENAME = (
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
_ORIGINAL_TOWER = ("vision_model.vision_tower", TIMM)
_CONVERTED_TOWER = (
    "model.vision_model",
    SiglipNames(blocks=replace(HF_BLOCKS, out="self_attn.projection_layer")),
)
_GENERATION = ("gen_", "model.vqmodel.", "model.generation_")  # of images


def decoder_config(config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """Read the decoder's settings: a plain Llama."""
    text = spec.text_config(config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return common_config(text, rope_config(text, head_dim), tied=tied, **llama_biases(text))


class Janus(Model):
    """A Janus-Pro checkpoint on one device."""

    invariant = True

    def __init__(
        self,
        family: spec.Janus,
        decoder: Decoder,
        embedding: Tensor,
        tower: SiglipTower,
        aligner: MLP,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.tower = tower
        self.aligner = aligner
        self.mean = family.image_mean
        self.std = family.image_std

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        pictures = [
            render_view(image, layout.views[0])
            for image, layout in zip(images, layouts, strict=True)
        ]
        stacked = torch.stack(pictures)
        patches = image_patches(stacked, self.tower.config.patch, self.mean, self.std, self.dtype)
        features = self.tower(patches)
        return self.aligner(features.flatten(0, 1))


def build(checkpoint: Checkpoint, family: spec.Janus, weights: Weights) -> Janus:
    """Take the model's tensors from `weights`."""
    # NOTE: converted files that leave the key out hold an own head all the same.
    own = weights.has("lm_head.weight")
    tied = spec.text_config(checkpoint.config).get("tie_word_embeddings", False)
    if family.converted:
        tied = checkpoint.config.get("tie_word_embeddings", not own)
    config = decoder_config(checkpoint.config, bool(tied))
    t, hidden = family.tower, config.hidden_size
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, hidden))
    vit = VitConfig(t.layers, t.width, t.heads, t.inner, t.patch, t.side, t.act, t.eps)
    name, tower_names = _CONVERTED_TOWER if family.converted else _ORIGINAL_TOWER
    tower = SiglipTower(weights, vit, name, names=tower_names)
    names = ("aligner.layers.0", "aligner.layers.2")
    aligner = MLP.take(weights, names, (t.width, hidden, hidden), t.act)
    decoder = Decoder.take(weights, config, embedding)
    for prefix in _GENERATION:
        weights.drop_all(prefix)
    return Janus(family, decoder, embedding, tower, aligner)
