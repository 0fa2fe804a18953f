"""Janus-Pro, reading images only: detection, image layout, prompt.

Two layouts: the original (`multi_modality`, image generation beside it) and transformers'
(`janus`). Every image is one square picture. The weights' side stands in `model.py`.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.models.processor import BICUBIC, CLIP_MEAN, CLIP_STD, mean_colour
from pipeline.rows import ImageLayout, View
from pipeline.settings import ModelSettings
from pipeline.templates import janus_pro

IMAGE_TOKEN = "<image_placeholder>"
_SPLICED = ("<begin_of_image>", IMAGE_TOKEN, "<end_of_image>")  # by id, never cut from a text
_PROMPT = {"sft_format": "deepseek", "image_tag": IMAGE_TOKEN, "add_special_token": False}
# The original config names its tower and lists only what is not its own: width, layers, heads,
# patch, MLP ratio, as the official table has them.
_TOWERS = {
    "siglip_large_patch16_384": (1024, 24, 16, 16, 4.0),
    "siglip_so400m_patch14_384": (1152, 27, 16, 14, 3.7362),
    "siglip_so400m_patch14_224": (1152, 27, 16, 14, 3.7362),
}
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class TowerSizes:
    """The image tower of either layout."""

    width: int
    layers: int
    heads: int
    inner: int
    side: int
    patch: int
    act: str = "gelu"
    eps: float = 1e-6


def is_converted(config: Mapping[str, Any]) -> bool:
    """True for transformers' layout."""
    return config.get("model_type") == "janus" and "vq_config" in config


def matches(config: Mapping[str, Any]) -> bool:
    """True for a Janus checkpoint, judged by its plain config.json."""
    if is_converted(config):
        return True
    named = "MultiModalityCausalLM" in (config.get("architectures") or [])
    named = named or config.get("model_type") == "multi_modality"
    vision = (config.get("vision_config") or {}).get("params") or {}
    # NOTE: DeepSeek-VL has the same names; it generates no images.
    return (
        named
        and {"gen_vision_config", "aligner_config", "language_config"} <= config.keys()
        and vision.get("model_name", "siglip_large_patch16_384") in _TOWERS
    )


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Janus:
    return Janus(checkpoint, settings)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys; what is left out has Llama's defaults."""
    return _LLAMA | (config.get("text_config") or config.get("language_config") or {})


def tower_sizes(config: Mapping[str, Any]) -> TowerSizes:
    """The image tower's sizes, of either layout."""
    v = config.get("vision_config") or {}
    if is_converted(config):
        width = v.get("hidden_size", 1024)
        return TowerSizes(
            width,
            v.get("num_hidden_layers", 24),
            v.get("num_attention_heads", 16),
            int(width * v.get("mlp_ratio", 4.0)),
            v.get("image_size", 384),
            v.get("patch_size", 16),
            v.get("hidden_act", "gelu"),
            v.get("layer_norm_eps", 1e-6),
        )
    p = v.get("params") or {}
    if p.get("pixel_mean") is not None and p.get("pixel_std") is not None:
        raise UserError("config.json: a tower that normalises pixels itself is not supported")
    width, layers, heads, patch, ratio = _TOWERS[p.get("model_name", "siglip_large_patch16_384")]
    width, layers = p.get("width", width), p.get("layers", layers)
    chosen = p.get("select_layer", -2)
    layers = min(layers, chosen if chosen > 0 else layers + chosen + 1)
    inner = int(width * p.get("mlp_ratio", ratio))
    side, patch = p.get("image_size", 336), p.get("patch_size", patch)
    return TowerSizes(width, layers, p.get("heads", heads), inner, side, patch)


class Janus(Family):
    """A Janus-Pro checkpoint without its weights."""

    name = "janus"
    templates = ("janus-pro",)
    transparency = "drop"

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        if settings.min_pixels is not None or settings.max_pixels is not None:
            raise UserError("Janus models make every image one size: leave model.*_pixels null.")
        config = checkpoint.config
        self.converted = is_converted(config)
        self.tower = tower_sizes(config)
        text = text_config(config)
        # NOTE: a marker that this tokenizer has not is ordinary text, cut nowhere.
        self.own_ids = _spliced(checkpoint)
        known = [
            token
            for token in janus_pro.TEMPLATE.control
            if token in self.own_ids or checkpoint.token_id(token) is not None
        ]
        self.template = replace(janus_pro.TEMPLATE, control=tuple(known))
        self.image_token_id = self.own_ids[IMAGE_TOKEN]
        self.context_length = int(text["max_position_embeddings"])
        # NOTE: the text config's eos_token_id is Llama's default, not this tokenizer's.
        self.eos_token_ids = end_tokens(checkpoint, {}, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, self.tower)
        prompt = checkpoint.json("processor_config.json") or {}
        if any(prompt.get(key, value) != value for key, value in _PROMPT.items()):
            raise UserError(f"processor_config.json: only prompts of {_PROMPT} are known")
        self._read_processor(checkpoint.preprocessor_config)

    def _read_processor(self, processor: Mapping[str, Any]) -> None:
        size = processor.get("size") or {}
        self.image_side = int(processor.get("image_size") or size.get("height", 384))
        if self.image_side != self.tower.side:
            raise UserError(
                f"preprocessor_config.json makes pictures of {self.image_side} pixels a side, "
                f"the image tower takes {self.tower.side}."
            )
        if processor.get("resample", BICUBIC) != BICUBIC:
            raise UserError("preprocessor_config.json: only bicubic resizing is known")
        if not (processor.get("do_resize", True) and processor.get("do_pad", True)):
            raise UserError("preprocessor_config.json: pictures must be resized and padded")
        self.min_side = int(processor.get("min_size", 14))
        mean = processor.get("image_mean", CLIP_MEAN)
        self.background = (127, 127, 127) if mean is None else mean_colour(mean)
        self.image_mean, self.image_std = _norm(processor)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """One square picture: the longer side fills it, the rest is the mean colour."""
        side, longer = self.image_side, max(width, height)
        rows, columns = self._scaled(height, longer), self._scaled(width, longer)
        offset = ((side - rows) // 2, (side - columns) // 2)
        grid = self.tower.side // self.tower.patch
        view = View(side, side, (rows, columns), offset, self.background)
        return ImageLayout(side, side, (1, grid, grid), grid * grid, (view,))

    def _scaled(self, side: int, longer: int) -> int:
        """The original processor cuts fractions off, transformers' rounds."""
        if self.converted:
            return max(round(side * (self.image_side / longer)), self.min_side)
        return max(int(side / longer * self.image_side), self.min_side)


def _norm(processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels over 255, whatever factor the processor scales bytes by."""
    mean, std = processor.get("image_mean", CLIP_MEAN), processor.get("image_std", CLIP_STD)
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if factor == 1 / 255:
        return tuple(mean), tuple(std)
    return tuple(v / (255 * factor) for v in mean), tuple(v / (255 * factor) for v in std)


def _spliced(checkpoint: Checkpoint) -> dict[str, int]:
    """Ids of the markers around and in an image's block, added tokens or ordinary ones."""
    ids = {}
    for token in _SPLICED:
        found = checkpoint.token_id(token)
        found = checkpoint.vocabulary_id(token) if found is None else found
        if found is None:
            raise UserError(f"model.id {checkpoint.id!r}: the tokenizer has no {token!r}")
        ids[token] = found
    return ids


def _sizes(text: Mapping[str, Any], tower: TowerSizes) -> ModelSizes:
    hidden = text["hidden_size"]
    block = 4 * tower.width**2 + 2 * tower.width * tower.inner
    return ModelSizes(
        **decoder_sizes(text),
        vision_params=tower.layers * block,
        projector_params=tower.width * hidden + hidden**2,
        patches_per_token=1,
        vision_width=tower.width,
        vision_full_blocks=tower.layers,
    )
