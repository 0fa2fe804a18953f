"""Kimi-VL (A3B): detection, image layout, prompt.

A picture keeps its size unless it has too many patches, and is padded to whole tokens. The weights'
side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.deepseek_sizes import text_sizes
from pipeline.models.family import Family, ModelSizes, default_sampling, end_tokens
from pipeline.models.processor import CLIP_MEAN, CLIP_STD
from pipeline.rows import ImageLayout, View
from pipeline.settings import ModelSettings
from pipeline.templates import kimi_vl

MAX_SIDE = 512  # patches; the tower's rotary table ends there
# What the original classes take for a key that the json leaves out.
_TEXT = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_VISION = {
    "patch_size": 14,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "merge_kernel_size": (2, 2),
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys, with the original defaults."""
    return _TEXT | config["text_config"]


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's keys, with the original defaults."""
    return _VISION | config["vision_config"]


def matches(config: Mapping[str, Any]) -> bool:
    """True for Kimi-VL, judged by its plain config.json."""
    named = config.get("model_type") == "kimi_vl"
    named = named or "KimiVLForConditionalGeneration" in (config.get("architectures") or [])
    vision, text = config.get("vision_config"), config.get("text_config")
    if not (named and isinstance(vision, dict) and isinstance(text, dict)):
        return False
    return vision.get("model_type", "moonvit") == "moonvit" and "kv_lora_rank" in text


def build(checkpoint: Checkpoint, settings: ModelSettings) -> KimiVL:
    return KimiVL(checkpoint, settings)


class KimiVL(Family):
    """A Kimi-VL checkpoint without its weights."""

    name = "kimi-vl"
    templates = ("kimi-vl",)
    template = kimi_vl.TEMPLATE
    transparency = "drop"

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        text, vision = text_config(config), vision_config(config)
        missing = [t for t in self.template.control if checkpoint.token_id(t) is None]
        if missing:
            raise UserError(f"model.id {settings.id!r}: the tokenizer has no {missing[0]!r}")
        self.image_token_id = int(config.get("media_placeholder_token_id", 163605))
        self.context_length = int(text["max_position_embeddings"])
        # NOTE: the shipped files name [EOS] alone, and an answer ends with <|im_end|>.
        named = [checkpoint.token_id(token) for token in self.template.stop]
        ends = [*end_tokens(checkpoint, text, self.template), *(i for i in named if i is not None)]
        self.eos_token_ids = tuple(dict.fromkeys(ends))
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, vision)
        self._read_processor(checkpoint.preprocessor_config, vision)
        self._limit(settings)

    def _read_processor(self, processor: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
        if not processor.get("pad_input", False):
            raise UserError("preprocessor_config.json: only `pad_input: true` is known")
        self.patch_size = int(processor.get("patch_size", vision["patch_size"]))
        rows, columns = processor.get("merge_kernel_size") or vision["merge_kernel_size"]
        if rows != columns or self.patch_size != vision["patch_size"]:
            raise UserError("preprocessor_config.json: patches do not fit the image tower")
        self.merge_size = int(rows)
        self.max_patches = int(processor.get("in_token_limit", 4096))
        self.image_mean = tuple(processor.get("image_mean") or CLIP_MEAN)
        self.image_std = tuple(processor.get("image_std") or CLIP_STD)

    def _limit(self, settings: ModelSettings) -> None:
        """`model.max_pixels` counts, as the processor's own limit does, before the padding."""
        token = (self.patch_size * self.merge_size) ** 2
        most = settings.max_pixels
        if settings.min_pixels is not None or (most is not None and most < token):
            raise UserError(f"model.max_pixels must be {token} or more, min_pixels null.")
        if most is not None:
            self.max_patches = min(self.max_patches, most // self.patch_size**2)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """Shrunk to the patches allowed, then padded below and on the right with black."""
        patch = self.patch_size
        count = (width // patch) * (height // patch)
        columns, rows = width, height
        if count > self.max_patches:
            scale = math.sqrt(self.max_patches / count)
            columns, rows = int(width * scale), int(height * scale)
        unit = patch * self.merge_size
        wide, high = -(-columns // unit) * unit, -(-rows // unit) * unit
        if max(wide, high) // patch >= MAX_SIDE:
            raise RowError(
                "bad_aspect_ratio",
                f"The image is {width}x{height}; the model takes {MAX_SIDE - 1} patches a side.",
            )
        grid = (1, high // patch, wide // patch)
        tokens = (high // unit) * (wide // unit)
        return ImageLayout(high, wide, grid, tokens, (View(high, wide, (rows, columns)),))


def _sizes(text: Mapping[str, Any], v: Mapping[str, Any]) -> ModelSizes:
    width, layers = v["hidden_size"], v["num_hidden_layers"]
    merge = math.prod(v["merge_kernel_size"])
    unit = width * merge
    return ModelSizes(
        vision_params=layers * (4 * width**2 + 2 * width * v["intermediate_size"]),
        projector_params=unit**2 + unit * text["hidden_size"],
        patches_per_token=merge,
        vision_width=width,
        vision_full_blocks=layers,
        **text_sizes(text),
    )
