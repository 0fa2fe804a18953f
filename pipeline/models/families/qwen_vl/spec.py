"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): detection, image layout, M-RoPE positions.

Everything is read from the checkpoint's own JSON; `variant` says which of the three it is. The
weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import RowError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family, ModelSizes, default_sampling, end_tokens
from pipeline.rows import ImageLayout, PlacedImage
from pipeline.settings import ModelSettings
from pipeline.templates import qwen2_vl

VARIANTS = {
    "Qwen2VLForConditionalGeneration": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5",
    "Qwen3VLForConditionalGeneration": "qwen3",
}
_MODEL_TYPES = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3"}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_RATIO = 200


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's keys: nested in newer files, at the top in the original ones."""
    nested = config.get("text_config")
    return {**config, **nested} if nested else config


def mrope_section(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rotary frequencies of each axis, wherever the file's version keeps them."""
    text = text_config(config)
    for key in ("rope_scaling", "rope_parameters"):
        section = (text.get(key) or {}).get("mrope_section")
        if section:
            return tuple(section)
    return None


def variant_of(config: Mapping[str, Any]) -> str | None:
    """qwen2, qwen2_5 or qwen3: by the architecture's name and the shape of the config."""
    names = config.get("architectures") or []
    variant = next((VARIANTS[name] for name in names if name in VARIANTS), None)
    if variant is None and not names:
        variant = _MODEL_TYPES.get(config.get("model_type", ""))
    vision = config.get("vision_config")
    if variant is None or not isinstance(vision, dict) or mrope_section(config) is None:
        return None
    if "num_experts" in text_config(config):
        return None
    return variant if variant == _vision_variant(vision, variant) else None


def _vision_variant(vision: Mapping[str, Any], named: str) -> str:
    if "deepstack_visual_indexes" in vision:
        return "qwen3"
    if "fullatt_block_indexes" in vision or "window_size" in vision:
        return "qwen2_5"
    if "embed_dim" in vision:
        return "qwen2"
    return named


def matches(config: Mapping[str, Any]) -> bool:
    """True for a dense Qwen-VL checkpoint, judged by its plain config.json."""
    return variant_of(config) is not None


def build(checkpoint: Checkpoint, settings: ModelSettings) -> QwenVL:
    return QwenVL(checkpoint, settings)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The official resize rule: multiples of `factor`, area in bounds, ratio nearly kept."""
    if max(height, width) / min(height, width) > _MAX_RATIO:
        raise RowError(
            "bad_aspect_ratio",
            f"The image is {width}x{height}; the model takes sides of at most {_MAX_RATIO} to 1.",
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


class QwenVL(Family):
    """A Qwen-VL checkpoint without its weights."""

    name = "qwen-vl"
    templates = ("qwen2-vl",)
    num_axes = 3

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        text = text_config(config)
        variant = variant_of(config)
        assert variant is not None
        self.variant = variant
        self.template = qwen2_vl.QWEN3 if variant == "qwen3" else qwen2_vl.TEMPLATE
        self.image_token_id = int(config.get("image_token_id", 151655))
        self.context_length = int(text.get("max_position_embeddings", 32768))
        self.eos_token_ids = end_tokens(checkpoint, text, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, config["vision_config"], variant)
        self._read_processor(checkpoint.preprocessor_config, config["vision_config"], settings)

    def _read_processor(
        self, processor: Mapping[str, Any], vision: Mapping[str, Any], settings: ModelSettings
    ) -> None:
        newer = self.variant == "qwen3"
        size = processor.get("size") or {}
        self.patch_size = int(processor.get("patch_size") or vision.get("patch_size", 14))
        self.merge_size = int(processor.get("merge_size") or vision.get("spatial_merge_size", 2))
        self.temporal_patch_size = int(processor.get("temporal_patch_size", 2))
        half = (0.5, 0.5, 0.5)
        self.image_mean = tuple(processor.get("image_mean") or (half if newer else _CLIP_MEAN))
        self.image_std = tuple(processor.get("image_std") or (half if newer else _CLIP_STD))
        self.min_pixels = settings.min_pixels or int(
            processor.get("min_pixels")
            or size.get("shortest_edge")
            or size.get("min_pixels")
            or (65_536 if newer else 56 * 56)
        )
        self.max_pixels = settings.max_pixels or int(
            processor.get("max_pixels")
            or size.get("longest_edge")
            or size.get("max_pixels")
            or (16_777_216 if newer else 28 * 28 * 1280)
        )

    @property
    def factor(self) -> int:
        """Pixels of a side that one image token covers."""
        return self.patch_size * self.merge_size

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        rows, columns = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return ImageLayout(
            height=rows,
            width=columns,
            grid=(1, rows // self.patch_size, columns // self.patch_size),
            num_tokens=(rows // self.factor) * (columns // self.factor),
        )

    def positions(
        self, tokens: np.ndarray, images: Sequence[PlacedImage]
    ) -> tuple[np.ndarray, int]:
        """M-RoPE: text advances all axes by one a token, an image by its longer side."""
        positions = np.empty((self.num_axes, len(tokens)), np.int32)
        index = position = 0
        for image in images:
            text = image.start - index
            positions[:, index : image.start] = np.arange(position, position + text)
            position += text
            rows = image.layout.grid[1] // self.merge_size
            columns = image.layout.grid[2] // self.merge_size
            index = image.start + rows * columns
            block = positions[:, image.start : index]
            block[0] = position
            block[1] = position + np.repeat(np.arange(rows), columns)
            block[2] = position + np.tile(np.arange(columns), rows)
            position += max(rows, columns)
        rest = len(tokens) - index
        positions[:, index:] = np.arange(position, position + rest)
        return positions, position + rest


def _sizes(text: Mapping[str, Any], vision: Mapping[str, Any], variant: str) -> ModelSizes:
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    heads, kv_heads = text["num_attention_heads"], text.get("num_key_value_heads")
    head_dim, kv_heads = text.get("head_dim") or hidden // heads, kv_heads or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * text["intermediate_size"]
    tables = 1 if text.get("tie_word_embeddings") else 2
    width = vision.get("embed_dim") if variant == "qwen2" else vision.get("hidden_size")
    width = int(width or 1280)
    inner = int(vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4))
    matrices = 3 if variant == "qwen2_5" else 2
    depth = int(vision.get("depth", 32))
    merged = width * vision.get("spatial_merge_size", 2) ** 2
    return ModelSizes(
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_heads=heads,
        decoder_params=layers * (attention + mlp),
        embedding_params=tables * hidden * text["vocab_size"],
        vision_params=depth * (4 * width * width + matrices * width * inner),
        projector_params=merged * merged + merged * hidden,
        patches_per_token=vision.get("spatial_merge_size", 2) ** 2,
        vision_width=width,
        vision_full_blocks=len(vision.get("fullatt_block_indexes", range(depth))),
    )
