"""Llama 3.2 Vision: detection, tiles, image states, sizes.

An image is one token of the prompt; layers of cross-attention read its states, of up to four tiles.
The weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from pipeline.models.processor import CLIP_MEAN, CLIP_STD, check_size, check_steps, refusal
from pipeline.rows import ImageLayout, Turn, View
from pipeline.settings import ModelSettings
from pipeline.templates import llama_3_vision
from pipeline.templates.render import Piece

_HALF = (0.5, 0.5, 0.5)  # of a processor's file that does not say
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
_TEXT_DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "cross_attention_layers": _CROSS_LAYERS,
}
_VISION_DEFAULTS = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "hidden_act": "gelu",
    "max_num_tiles": 4,
    "intermediate_layers_indices": (3, 7, 15, 23, 30),
}
EXTRA_EMBEDDINGS = 8  # rows of the token table that the head lacks, the image token among them


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = {**_TEXT_DEFAULTS, **config["text_config"]}
    there = range(text["num_hidden_layers"])
    cross = text["cross_attention_layers"]
    if cross is None:
        cross = _CROSS_LAYERS
    return text | {"cross_attention_layers": tuple(i for i in there if i in cross)}


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    given = {key: value for key, value in vision.items() if value is not None}
    heads = vision.get("attention_heads") or vision.get("num_attention_heads")
    return {**_VISION_DEFAULTS, **given} | ({"attention_heads": heads} if heads else {})


def matches(config: Mapping[str, Any]) -> bool:
    """True for a Llama 3.2 Vision checkpoint, judged by its plain config.json."""
    names = config.get("architectures") or []
    named = "MllamaForConditionalGeneration" in names
    if not named and (names or config.get("model_type") != "mllama"):
        return False
    return all(isinstance(config.get(f"{part}_config"), dict) for part in ("text", "vision"))


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Mllama:
    return Mllama(checkpoint, settings)


def arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """Rows and columns of tiles that an image may have; its id is its place here plus one."""
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


def choose_canvas(width: int, height: int, side: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the smallest canvas that holds the image, or of the least shrinking."""
    options = arrangements(max_tiles)
    scales = [min(c * side / width, r * side / height) for r, c in options]
    larger = [scale for scale in scales if scale >= 1]
    best = min(larger) if larger else max(scales)
    fitting = [option for option, scale in zip(options, scales, strict=True) if scale == best]
    return min(fitting, key=lambda option: option[0] * option[1])


def fit(width: int, height: int, side: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image on its canvas: shrunk to it, enlarged to one tile at most."""
    wide = min(max(width, side), canvas[1] * side)
    high = min(max(height, side), canvas[0] * side)
    scale_high, scale_wide = high / height, wide / width
    if scale_wide < scale_high:
        return min(math.floor(height * scale_wide) or 1, high), wide
    return high, min(math.floor(width * scale_high) or 1, wide)


class Mllama(Family):
    """A Llama 3.2 Vision checkpoint without its weights."""

    name = "mllama"
    templates = ("llama_3_vision",)
    template = llama_3_vision.TEMPLATE
    images_reach_back = True

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        text, vision = text_config(config), vision_config(config)
        token = config.get("image_token_index", config.get("image_token_id", 128_256))
        self.image_token_id = int(token)
        self.context_length = int(text["max_position_embeddings"])
        self.eos_token_ids = end_tokens(checkpoint, text, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, vision)
        self.side = int(vision["image_size"])
        self.patch = int(vision["patch_size"])
        self.max_tiles = int(vision["max_num_tiles"])
        _check_layers(checkpoint, text, vision)
        self._read_processor(checkpoint)

    def _read_processor(self, checkpoint: Checkpoint) -> None:
        processor = checkpoint.preprocessor_config
        check_steps(checkpoint, *_FILTERS)
        check_size(checkpoint, "size", self.side)
        tiles = processor.get("max_image_tiles") or self.max_tiles
        if tiles != self.max_tiles:
            raise refusal(checkpoint, "max_image_tiles", tiles)
        mean, std = (_HALF, _HALF) if processor else (CLIP_MEAN, CLIP_STD)
        self.image_mean = tuple(processor.get("image_mean") or mean)
        self.image_std = tuple(processor.get("image_std") or std)
        self.filter = _FILTERS[processor.get("resample", 2)]

    @property
    def states_per_tile(self) -> int:
        return states_per_tile(self.side, self.patch)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        canvas = choose_canvas(width, height, self.side, self.max_tiles)
        rows, columns = canvas
        view = View(
            rows * self.side,
            columns * self.side,
            fit(width, height, self.side, canvas),
            filter=self.filter,
        )
        grid = self.side // self.patch
        tiles = rows * columns
        return ImageLayout(
            height=view.height,
            width=view.width,
            grid=(1, rows * grid, columns * grid),
            num_tokens=1,
            views=(view,),
            num_states=tiles * self.states_per_tile,
            num_padding_states=(self.max_tiles - tiles) * self.states_per_tile,
        )

    def tiles(self, layout: ImageLayout) -> tuple[int, int]:
        """Rows and columns of the image's tiles."""
        return layout.height // self.side, layout.width // self.side

    def render(self, turns: Sequence[Turn]) -> tuple[Piece, ...]:
        return super().render(llama_3_vision.with_dates(turns))


def _check_layers(
    checkpoint: Checkpoint, text: Mapping[str, Any], vision: Mapping[str, Any]
) -> None:
    """Refuse a tower or a decoder whose lists name no layers that there are."""
    depth, kept = vision["num_hidden_layers"], vision["intermediate_layers_indices"]
    wanted = {
        "cross_attention_layers": 0
        < len(text["cross_attention_layers"])
        < text["num_hidden_layers"],
        "intermediate_layers_indices": bool(kept) and all(-depth <= i < depth for i in kept),
        "supported_aspect_ratios": num_arrangements(vision)
        >= len(arrangements(vision["max_num_tiles"])),
    }
    for key, right in wanted.items():
        if not right:
            raise UserError(
                f"model.id {checkpoint.id!r}: {key} in its config.json does not fit the model"
            )


def num_arrangements(vision: Mapping[str, Any]) -> int:
    """Arrangements of tiles that the tower's tables have rows for."""
    return len(vision.get("supported_aspect_ratios") or arrangements(4))


def states_per_tile(side: int, patch: int) -> int:
    """Vectors that a tile gives: one a patch and one for the whole."""
    return int((side // patch) ** 2 + 1)


def _sizes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> ModelSizes:
    decoder, num_cross = decoder_sizes(text), len(text["cross_attention_layers"])
    width, depth = vision["hidden_size"], vision["num_hidden_layers"] + vision["num_global_layers"]
    block = 4 * width * width + 2 * width * vision["intermediate_size"]
    states = states_per_tile(vision["image_size"], vision["patch_size"]) * vision["max_num_tiles"]
    outputs = width * (1 + len(vision["intermediate_layers_indices"]))
    tables = (num_arrangements(vision) + 1) * states * width
    plain_layers = decoder["num_layers"] - num_cross  # the others keep no keys of the text
    return ModelSizes(
        **(decoder | {"num_layers": plain_layers}),
        vision_params=depth * block,
        projector_params=outputs * text["hidden_size"] + tables,
        patches_per_token=states,
        values_per_state=2 * num_cross * decoder["num_kv_heads"] * decoder["head_dim"],
        vision_width=width,
        vision_full_blocks=depth,
    )
