"""Kimi-VL on a device: tensor names, tower, projector and decoder settings.

Knows no chat template.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.kernels.patchify import patchify
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder
from pipeline.models.deepseek import deepseek_config
from pipeline.models.families.kimi_vl import spec
from pipeline.models.layers import MLP, LayerNorm
from pipeline.models.loading import Weights
from pipeline.models.vision.moonvit import MoonVit
from pipeline.models.vision.views import render_view
from pipeline.models.vision.vit import VitConfig
from pipeline.rows import ImageLayout

EPS = 1e-5  # of the tower's and the projector's norms
RENAME = ((r"^language_model\.", ""),)


class KimiVL(Model):
    """A Kimi-VL checkpoint on one device."""

    def __init__(
        self,
        family: spec.KimiVL,
        decoder: Decoder,
        embedding: Tensor,
        tower: MoonVit,
        norm: LayerNorm,
        projector: MLP,
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.tower = tower
        self.norm = norm
        self.projector = projector
        self.mean, self.std = family.image_mean, family.image_std

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        c, merge = self.tower.config, self.tower.merge
        pictures = [
            render_view(image, layout.views[0])
            for image, layout in zip(images, layouts, strict=True)
        ]
        patches = patchify(pictures, c.patch, merge, 1, self.mean, self.std, self.dtype)
        features = self.tower(patches, [layout.grid for layout in layouts])
        return self.projector(self.norm(features)[0].view(-1, c.size * merge**2))


def build(checkpoint: Checkpoint, family: spec.KimiVL, weights: Weights) -> KimiVL:
    """Take the model's tensors from `weights`."""
    text = spec.text_config(checkpoint.config)
    v = spec.vision_config(checkpoint.config)
    config = deepseek_config(text, tied=bool(text.get("tie_word_embeddings", False)))
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    vit = VitConfig(
        depth=v["num_hidden_layers"],
        size=v["hidden_size"],
        heads=v["num_attention_heads"],
        inner=v["intermediate_size"],
        patch=v["patch_size"],
        side=v["init_pos_emb_width"] * v["patch_size"],
        eps=EPS,
    )
    table = (v["init_pos_emb_height"], v["init_pos_emb_width"])
    tower = MoonVit(weights, vit, table, family.merge_size, "vision_tower")
    norm = LayerNorm.take(weights, "multi_modal_projector.pre_norm", vit.size, EPS)
    unit = vit.size * family.merge_size**2
    names = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    projector = MLP.take(weights, names, (unit, unit, config.hidden_size), "gelu")
    decoder = Decoder.take(weights, config, embedding)
    return KimiVL(family, decoder, embedding, tower, norm, projector)
