"""Gemma 3: detection, image layout, sizes. One square picture an image, 256 tokens each; with pan
and scan, crops of long images too (`crops.py`).

The hub's configs name few keys; what they leave out are the defaults below. A text model of the
family (1B, 270M) loads too and takes no images. The weights' side stands in `model.py`. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.gemma3.crops import BETWEEN, CropRule, Joints, with_crops
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.models.processor import check_steps
from pipeline.rows import ImageLayout, Turn, View
from pipeline.settings import ModelSettings
from pipeline.templates import gemma_it
from pipeline.templates.render import Control, render
from pipeline.tokenizer import Tokenizer

_ARCHITECTURES = ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")
_MODEL_TYPES = ("gemma3", "gemma3_text")
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys: nested beside a tower, at the top of a text model."""
    return {**_TEXT_DEFAULTS, **(config.get("text_config") or config)}


def vision_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tower's keys; None for a text model."""
    vision = config.get("vision_config")
    return {**_VISION_DEFAULTS, **vision} if isinstance(vision, dict) else None


def matches(config: Mapping[str, Any]) -> bool:
    """True for a Gemma 3 checkpoint, judged by its plain config.json."""
    names = config.get("architectures") or []
    named = any(name in _ARCHITECTURES for name in names)
    if not named and (names or config.get("model_type") not in _MODEL_TYPES):
        return False
    nested = isinstance(config.get("text_config"), dict)
    return nested or "num_hidden_layers" in config


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Gemma3:
    return Gemma3(checkpoint, settings)


class Gemma3(Family):
    """A Gemma 3 checkpoint without its weights."""

    name = "gemma3"
    templates = ("gemma-it",)
    template = gemma_it.TEMPLATE
    pans_and_scans = True

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        text, vision = text_config(config), vision_config(config)
        if text.get("use_bidirectional_attention"):
            raise UserError(f"model.id {settings.id!r} is an embedding model: it writes no text")
        token = config.get("image_token_index", config.get("image_token_id", 262_144))
        self.image_token_id = int(token)
        self.context_length = int(text["max_position_embeddings"])
        self.eos_token_ids = end_tokens(checkpoint, config, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, vision, int(config.get("mm_tokens_per_image") or 256))
        self._checkpoint = checkpoint
        self._layout: ImageLayout | None = None
        processor = checkpoint.preprocessor_config
        wanted = settings.pan_and_scan or processor.get("do_pan_and_scan")
        self.crops = CropRule.read(processor) if wanted else None
        if vision is None:
            self.takes = frozenset()
        else:
            check_steps(checkpoint, *_FILTERS)
            self._read_processor(processor, config, vision)

    def _read_processor(
        self, processor: Mapping[str, Any], config: Mapping[str, Any], vision: Mapping[str, Any]
    ) -> None:
        self.image_mean = tuple(processor.get("image_mean") or (0.5, 0.5, 0.5))
        self.image_std = tuple(processor.get("image_std") or (0.5, 0.5, 0.5))
        side, patches = int(vision["image_size"]), int(vision["image_size"]) // vision["patch_size"]
        size = processor.get("size") or {}
        if size and (size.get("height"), size.get("width")) != (side, side):
            raise UserError(
                f"preprocessor_config.json resizes images to {size}, the tower takes {side} pixels."
            )
        number = processor.get("resample")
        filter = _FILTERS[2 if number is None else number]
        self.whole = View(side, side, (side, side), filter=filter)
        self.tokens = int(config.get("mm_tokens_per_image") or 256)
        if not _averages(patches, self.tokens):
            raise UserError(
                f"{patches} x {patches} patches cannot be averaged to {self.tokens} tokens."
            )
        self._layout = ImageLayout(side, side, (1, patches, patches), self.tokens, (self.whole,))

    @cached_property
    def joints(self) -> Joints:
        """The tokens between the pictures of one image."""
        tokenizer = Tokenizer(self._checkpoint, self.control)
        first, image, last = "<end_of_image>\n\n", "\n\n", "<start_of_image>"
        ids = [
            tokenizer.ids(f"{first}{words}{image}{last}", special=True) for words in (BETWEEN, " ")
        ]
        return Joints(*ids)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """Every image, and every crop of it, is squeezed into the same square."""
        if self._layout is None:
            raise RowError("unsupported_input", "The model is a text model and takes no images.")
        boxes = self.crops.boxes(width, height) if self.crops is not None else []
        if not boxes:
            return self._layout
        views = (self.whole, *(replace(self.whole, box=box) for box in boxes))
        soft = np.zeros(self.tokens, np.int32)
        num_tokens = len(self.joints.ids(len(views), soft))
        return replace(self._layout, num_tokens=num_tokens, views=views)

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        soft = np.full(self.tokens, self.image_token_id, np.int32)
        return soft if len(layout.views) == 1 else self.joints.ids(len(layout.views), soft)

    def tokenize(
        self, turns: Sequence[Turn], layouts: Sequence[ImageLayout], tokenizer: Tokenizer
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        pictures = [len(layout.views) for layout in layouts]
        if max(pictures, default=1) == 1:
            return super().tokenize(turns, layouts, tokenizer)
        expanded, opens = with_crops(turns, pictures)
        soft = np.full(self.tokens, self.image_token_id, np.int32)
        chunks, starts, length = [], {}, 0
        for piece in render(replace(self.template, strip_each=False), expanded):
            if isinstance(piece, int):
                if piece in opens:
                    starts[opens[piece]] = length
                chunk = soft
            else:
                chunk = tokenizer.ids(piece, special=isinstance(piece, Control))
            chunks.append(chunk)
            length += len(chunk)
        return np.concatenate(chunks), tuple(starts.values())


def _averages(patches: int, tokens: int) -> bool:
    """Whether squares of patches make `tokens`; patches beyond whole squares are left out."""
    side = math.isqrt(tokens)
    pool = patches // side
    return side**2 == tokens and pool > 0 and patches // pool == side


def _sizes(text: Mapping[str, Any], vision: Mapping[str, Any] | None, tokens: int) -> ModelSizes:
    decoder = decoder_sizes(text, tied=True)
    if vision is None:
        return ModelSizes(**decoder)
    width, depth = vision["hidden_size"], vision["num_hidden_layers"]
    return ModelSizes(
        **decoder,
        vision_params=depth * (4 * width * width + 2 * width * vision["intermediate_size"]),
        projector_params=width * text["hidden_size"],
        patches_per_token=(vision["image_size"] // vision["patch_size"]) ** 2 // tokens,
        vision_width=width,
        vision_full_blocks=depth,
    )
