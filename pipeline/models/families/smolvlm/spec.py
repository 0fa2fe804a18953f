"""SmolVLM2: detection, the tiles of an image and their markers in the prompt.

An image is enlarged to a fixed longer side, stretched to whole tiles, cut, and followed by itself
as one tile. The weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family, ModelSizes, decoder_sizes, default_sampling, end_tokens
from pipeline.models.processor import LANCZOS, check_steps, longest_edge
from pipeline.rows import ImageLayout, View
from pipeline.settings import ModelSettings
from pipeline.templates import smolvlm
from pipeline.tokenizer import Tokenizer

# What the class of transformers says where the file is silent.
_VISION = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 32,
}  # fmt: skip
_TEXT = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "rms_norm_eps": 1e-6,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
_LONGEST = 4096  # pixels of a side, whatever the settings say


def matches(config: Mapping[str, Any]) -> bool:
    """True for SmolVLM2, judged by its plain config.json."""
    named = "SmolVLMForConditionalGeneration" in (config.get("architectures") or ())
    return named and "text_config" in config and "vision_config" in config


def build(checkpoint: Checkpoint, settings: ModelSettings) -> SmolVLM:
    return SmolVLM(checkpoint, settings)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text = _TEXT | config["text_config"]
    if text.get("model_type", "llama") != "llama":
        raise UserError(f"text_config.model_type {text['model_type']!r} is unknown; known: 'llama'")
    return text


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return _VISION | config["vision_config"]


def enlarged(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height with the longer side at `longest` and the shorter one even."""
    ratio = width / height
    short = int(longest / ratio if width >= height else longest * ratio)
    short += short % 2
    wide, high = (longest, short) if width >= height else (short, longest)
    return _capped(max(wide, 1), max(high, 1))


def _capped(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > _LONGEST:
        width, height = _LONGEST, int(_LONGEST / ratio)
    elif height > width and height > _LONGEST:
        width, height = int(_LONGEST * ratio), _LONGEST
    return max(width, 1), max(height, 1)


def tiled(width: int, height: int, tile: int) -> tuple[int, int]:
    """Width and height as multiples of `tile`, the longer side first."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return width, math.ceil(int(width / ratio) / tile) * tile
    height = math.ceil(height / tile) * tile
    return math.ceil(int(height * ratio) / tile) * tile, height


class SmolVLM(Family):
    """A SmolVLM2 checkpoint without its weights."""

    name = "smolvlm"
    templates = ("smolvlm",)
    template = smolvlm.TEMPLATE

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        text, vision = text_config(checkpoint.config), vision_config(checkpoint.config)
        processor = checkpoint.preprocessor_config
        check_steps(checkpoint, LANCZOS)
        self.tile = longest_edge(checkpoint, "max_image_size", 364)
        self.longest = longest_edge(checkpoint, "size", 4 * 364)
        if settings.max_pixels is not None:  # whole tiles, since images are stretched to them
            tiles = math.isqrt(settings.max_pixels) // self.tile
            self.longest = min(self.longest, tiles * self.tile)
        if settings.min_pixels is not None or not self.longest:
            raise UserError(f"model.max_pixels must be {self.tile**2} or more, min_pixels null.")
        self.splits = bool(processor.get("do_image_splitting", True))
        self.image_mean = tuple(processor.get("image_mean") or (0.5, 0.5, 0.5))
        self.image_std = tuple(processor.get("image_std") or (0.5, 0.5, 0.5))
        self.shuffle = int(checkpoint.config.get("scale_factor", 2))
        self.grid = self.tile // vision["patch_size"]  # patches along a side of a tile
        if not self.grid or self.shuffle < 1 or self.grid % self.shuffle:
            raise UserError(
                f"model.id {checkpoint.id!r}: tiles of {self.grid} x {self.grid} patches cannot be"
                f" grouped by scale_factor {self.shuffle}"
            )
        self.tile_tokens = (self.grid // self.shuffle) ** 2
        self.context_length = int(text["max_position_embeddings"])
        self.eos_token_ids = end_tokens(checkpoint, checkpoint.config, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(checkpoint.config, vision, self.shuffle, self.grid)
        self._read_tokens(checkpoint)

    def _read_tokens(self, checkpoint: Checkpoint) -> None:
        ids = {name: checkpoint.token_id(name) for name in self.template.control}
        missing = [name for name in ("<image>", "<global-img>") if ids[name] is None]
        if missing:
            raise UserError(f"model.id {checkpoint.id!r}: the tokenizer has no {missing[0]}")
        self.image_token_id = ids["<image>"]
        self._ids = {name: number for name, number in ids.items() if number is not None}
        tokenizer = Tokenizer(checkpoint)
        self._line, self._lines = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        self._block = lru_cache(64)(self._make_block)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """Each view is made of the one before it; without tiles only the last is shown."""
        first = enlarged(width, height, self.longest)
        second = tiled(*first, self.tile) if self.splits else (self.tile, self.tile)
        columns, rows = second[0] // self.tile, second[1] // self.tile
        if columns * rows == 1:
            columns = rows = 0
        elif max(columns, rows) > smolvlm.MOST_TILES:
            raise RowError("bad_aspect_ratio", f"The image is {width}x{height}: too many tiles.")
        sizes = (first, second, (self.tile, self.tile)) if rows else (first, second)
        views = tuple(View(h, w, resized=(h, w), filter="lanczos") for w, h in sizes)
        tokens = len(self._block(rows, columns))
        return ImageLayout(second[1], second[0], (1, rows, columns), tokens, views)

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        return self._block(*layout.grid[1:])

    def _make_block(self, rows: int, columns: int) -> np.ndarray:
        edge = self._ids["<fake_token_around_image>"]
        pictures = [self._ids["<image>"]] * self.tile_tokens
        ids: list[int] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                ids += [edge, self._ids[f"<row_{row}_col_{column}>"], *pictures]
            ids += self._line if row < rows else self._lines
        block = np.array([*ids, edge, self._ids["<global-img>"], *pictures, edge], np.int32)
        block.setflags(write=False)
        return block


def _sizes(
    config: Mapping[str, Any], vision: Mapping[str, Any], shuffle: int, grid: int
) -> ModelSizes:
    text, width, depth = text_config(config), vision["hidden_size"], vision["num_hidden_layers"]
    return ModelSizes(
        **decoder_sizes(text, config.get("tie_word_embeddings", False)),
        vision_params=depth * (4 * width * width + 2 * width * vision["intermediate_size"]),
        projector_params=width * shuffle**2 * text["hidden_size"],
        patches_per_token=shuffle**2,
        patches_per_run=grid**2,
        vision_width=width,
        vision_full_blocks=depth,
    )
