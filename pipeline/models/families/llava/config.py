"""What a LLaVA checkpoint's config.json says, in one form for its two layouts.

The original layout is flat, with `mm_` keys; transformers' nests a text and a vision config. Knows
no prompt and no tensor. Imports no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava import pictures
from pipeline.models.families.llava.tower_sizes import (
    TowerSizes,
    converted_tower,
    original_tower,
)

ORIGINAL = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
ONEVISION = "LlavaOnevisionForConditionalGeneration"
CONVERTED = {
    "LlavaForConditionalGeneration": "pad",
    "LlavaNextForConditionalGeneration": "anyres",
    ONEVISION: "anyres_max_9",
}
LLAMA_3_VOCABULARY = 128_256
# What transformers' text configs take for a key that a file leaves out.
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
_TEXT = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _LLAMA
    | {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151_936,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,  # where `use_sliding_window` says so
    },
}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION = tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))


@dataclass(frozen=True)
class LlavaConfig:
    """One checkpoint's settings. `pinpoints` are (height, width), in the order of the file."""

    original: bool
    decoder: str  # llama | mistral | qwen2
    text: Mapping[str, Any]
    tower: TowerSizes
    skipped: int  # of a picture's features, the first ones that are no image tokens
    aspect: str  # pad | crop | squash | anyres | anyres_max_N
    pinpoints: tuple[tuple[int, int], ...] = ()
    unpads: bool = False  # tiles are cut to the image and every row ends with the newline
    projector_layers: int = 2  # 0: one map, whose name has no number
    projector_bias: bool = True
    projector_act: str = "gelu"
    tied: bool = False

    @property
    def picture_tokens(self) -> int:
        """Image tokens of one picture."""
        return self.tower.grid**2 + (self.tower.kind == "clip") - self.skipped

    @property
    def tiled(self) -> bool:
        return self.aspect.startswith("anyres")

    @property
    def max_tiles(self) -> int | None:
        """Tiles' worth of features that are kept; more are pooled."""
        found = re.fullmatch(r"anyres_max_(\d+)", self.aspect)
        return int(found.group(1)) if found else None


def architecture(config: Mapping[str, Any]) -> str | None:
    """The LLaVA class that the plain config.json names, if its keys are that class's."""
    names = config.get("architectures") or []
    for name in names:
        if name in ORIGINAL and "mm_vision_tower" in config and "text_config" not in config:
            return str(name)
        if name in CONVERTED and _text_type(config) in _TEXT and _has_llava_tower(config):
            return str(name)
    return None


def _text_type(config: Mapping[str, Any]) -> str:
    default = "qwen2" if ONEVISION in (config.get("architectures") or []) else "llama"
    return str((config.get("text_config") or {}).get("model_type", default))


def _has_llava_tower(config: Mapping[str, Any]) -> bool:
    vision = config.get("vision_config") or {}
    return vision.get("model_type", "clip_vision_model") in (
        "clip_vision_model",
        "siglip_vision_model",
    )


def row_of(config: Mapping[str, Any]) -> str | None:
    """llava, llava-next or llava-onevision: the row of the table that the checkpoint belongs to."""
    name = architecture(config)
    if name is None:
        return None
    text = {**config, **(config.get("text_config") or {})}
    if name == ONEVISION:
        return "llava-onevision"
    if name == "LlavaQwenForCausalLM" and "siglip" in str(config["mm_vision_tower"]):
        return "llava-onevision"
    stronger = name == "LlavaQwenForCausalLM" or _text_type(config) == "qwen2"
    stronger = stronger or int(text.get("vocab_size", 0)) >= LLAMA_3_VOCABULARY
    return "llava-next" if stronger else "llava"


def read(checkpoint: Checkpoint) -> LlavaConfig:
    """The checkpoint's settings. Raises UserError for what is not supported."""
    name = architecture(checkpoint.config)
    assert name is not None
    return _original(checkpoint, name) if name in ORIGINAL else _converted(checkpoint, name)


def _original(checkpoint: Checkpoint, name: str) -> LlavaConfig:
    c = checkpoint.config
    decoder = ORIGINAL[name]
    tower = original_tower(checkpoint)
    if c.get("mm_use_im_start_end"):
        raise UserError(f"model.id {checkpoint.id!r}: marks around images are not supported")
    select = c.get("mm_vision_select_feature", "patch")
    aspect = c.get("image_aspect_ratio") or "square"
    if aspect == "square":
        aspect = "crop" if tower.kind == "clip" else "squash"
    merge = c.get("mm_patch_merge_type", "flat")
    _check_tiling(checkpoint, aspect, merge, select)
    tiled = aspect.startswith("anyres")
    pairs = _pinpoints(c.get("image_grid_pinpoints"), tower.side) if tiled else ()
    return LlavaConfig(
        original=True,
        decoder=decoder,
        text=_TEXT[decoder] | dict(c),
        tower=tower,
        skipped=int(tower.kind == "clip" and select == "patch"),
        aspect=aspect,
        pinpoints=tuple((height, width) for width, height in pairs),
        unpads="unpad" in merge,
        projector_layers=_projector_layers(checkpoint, c.get("mm_projector_type", "linear")),
        tied=bool(c.get("tie_word_embeddings", False)),
    )


def _check_tiling(checkpoint: Checkpoint, aspect: str, merge: str, select: str) -> None:
    tiled = aspect == "anyres" or re.fullmatch(r"anyres_max_\d+", aspect) is not None
    if not tiled and aspect not in ("pad", "crop", "squash"):
        raise UserError(f"model.id {checkpoint.id!r}: image_aspect_ratio {aspect!r} is unknown")
    if tiled and merge != "spatial_unpad":
        raise UserError(f"model.id {checkpoint.id!r}: mm_patch_merge_type {merge!r} is unknown")
    if select not in ("patch", "cls_patch") or (tiled and select == "cls_patch"):
        raise UserError(f"model.id {checkpoint.id!r}: mm_vision_select_feature {select!r}")


def _projector_layers(checkpoint: Checkpoint, kind: str) -> int:
    if kind == "linear":
        return 0
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None:
        raise UserError(f"model.id {checkpoint.id!r}: mm_projector_type {kind!r} is unknown")
    return max(1, int(found.group(1)))


def _pinpoints(value: Any, side: int) -> Sequence[tuple[int, int]]:
    """Pairs of a list, of a list's text, or of a text such as `(1x1),...,(6x6)` times `side`."""
    try:
        if isinstance(value, str) and "x" in value:
            cells = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", value)]
            (top, left), (bottom, right) = cells[0], cells[-1]
            return [
                (i * side, j * side) for i in range(top, bottom + 1) for j in range(left, right + 1)
            ]
        if isinstance(value, str):
            value = ast.literal_eval(value)
        pairs = [(int(a), int(b)) for a, b in value]
    except (ValueError, SyntaxError, IndexError, TypeError) as error:
        raise UserError(f"config.json: image_grid_pinpoints {value!r} is no list") from error
    if not pairs or any(a % side or b % side or not a * b for a, b in pairs):
        raise UserError(f"config.json: image_grid_pinpoints are no multiples of {side}")
    return pairs


def _converted(checkpoint: Checkpoint, name: str) -> LlavaConfig:
    c = checkpoint.config
    decoder = _text_type(c)
    text = _TEXT[decoder] | dict(c.get("text_config") or {})
    onevision = name == ONEVISION
    layer = c.get("vision_feature_layer", -1 if onevision else -2)
    tower = converted_tower(c.get("vision_config"), layer, onevision)
    strategy = c.get("vision_feature_select_strategy", "full" if onevision else "default")
    pictures.check(checkpoint, tower.side)
    aspect = CONVERTED[name]
    if aspect == "pad":
        aspect = pictures.square_rule(checkpoint)
    elif onevision:
        aspect = c.get("vision_aspect_ratio", aspect)
        if re.fullmatch(r"anyres_max_\d+", aspect) is None:
            raise UserError(f"model.id {checkpoint.id!r}: vision_aspect_ratio {aspect!r}")
    default_pairs = _ONEVISION if onevision else _PINPOINTS
    tiled = aspect.startswith("anyres")
    pairs = _pinpoints(c.get("image_grid_pinpoints") or default_pairs, tower.side) if tiled else ()
    config = LlavaConfig(
        original=False,
        decoder=decoder,
        text=text,
        tower=tower,
        skipped=int(strategy == "default"),
        aspect=aspect,
        pinpoints=tuple(pairs),
        unpads=tiled,
        projector_bias=bool(c.get("multimodal_projector_bias", True)),
        projector_act=c.get("projector_hidden_act", "gelu"),
        tied=bool(c.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )
    if tiled:
        pictures.check_pinpoints(checkpoint, config.pinpoints)
    _check_strategy(checkpoint, config, strategy)
    return config


def _check_strategy(checkpoint: Checkpoint, config: LlavaConfig, strategy: str) -> None:
    """A tile's features must be its patches, a square's at least some of them."""
    tokens = config.picture_tokens
    fits = tokens == config.tower.grid**2 if config.tiled else tokens > 0
    if strategy not in ("default", "full") or not fits:
        raise UserError(
            f"model.id {checkpoint.id!r}: vision_feature_select_strategy {strategy!r} does not fit"
            f" its {config.tower.kind} tower"
        )
