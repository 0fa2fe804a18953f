"""Pixtral: detection, image layout, prompt, in transformers' layout and in Mistral's own.

Mistral's own has params.json instead of config.json; its code cuts sizes and resizes otherwise than
transformers', and each layout follows its own. The weights' side stands in `model.py`. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.models.processor import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    check_size,
    check_steps,
    refusal,
    sides,
)
from pipeline.rows import ImageLayout, Turn, View
from pipeline.settings import ModelSettings
from pipeline.templates import mistral
from pipeline.templates.render import Piece, render

_DEFAULT_CONTEXT = 131_072
_DEFAULT_LONGEST, _DEFAULT_PATCH = 1024, 16  # of a processor's file that does not say
_LATER = ("llama_4_scaling", "moe", "q_lora_rank", "quantization", "rope_scaling", "yarn")
_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


@dataclass(frozen=True)
class TowerSizes:
    """Sizes in values and pixels; `longest` is the longer side of an image at most."""

    blocks: int
    size: int
    heads: int
    inner: int
    patch: int
    longest: int
    theta: float
    act: str


def is_original(config: Mapping[str, Any]) -> bool:
    """True for the content of a params.json with Pixtral's own image tower."""
    vision = config.get("vision_encoder") or {}
    # NOTE: Mistral Small's has the same tower and another projector.
    other = vision.get("spatial_merge_size", 1) != 1 or vision.get("mm_projector_id")
    return {"dim", "n_layers", "n_heads"} <= config.keys() and bool(vision) and not other


def matches(config: Mapping[str, Any]) -> bool:
    """True for a Pixtral checkpoint, judged by its plain config.json or params.json."""
    if is_original(config):
        return True
    named = "LlavaForConditionalGeneration" in (config.get("architectures") or [])
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    return named and vision.get("model_type") == "pixtral" and text.get("model_type") == "mistral"


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Pixtral:
    return Pixtral(checkpoint, settings)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys by transformers' names; what is left out has its defaults."""
    if not is_original(config):
        text = _MISTRAL | (config.get("text_config") or {})
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return text | {"tie_word_embeddings": tied}
    return {
        "hidden_size": config["dim"],
        "intermediate_size": config["hidden_dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads", config["n_heads"]),
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_theta"],
        "max_position_embeddings": config.get("max_seq_len") or _DEFAULT_CONTEXT,
        "sliding_window": config.get("sliding_window"),
        "tie_word_embeddings": config.get("tied_embeddings", False),
    }


def tower_sizes(config: Mapping[str, Any]) -> TowerSizes:
    """The image tower's sizes, of either layout."""
    original = is_original(config)
    v = config["vision_encoder" if original else "vision_config"]
    rope = v.get("rope_parameters") or {}
    return TowerSizes(
        blocks=int(v.get("num_hidden_layers", 24)),
        size=int(v.get("hidden_size", 1024)),
        heads=int(v.get("num_attention_heads", 16)),
        inner=int(v.get("intermediate_size", 4096)),
        patch=int(v.get("patch_size", 16)),
        longest=int(v.get("image_size", 1024)),
        theta=float(rope.get("rope_theta") or v.get("rope_theta") or 1e4),
        act="silu" if original else v.get("hidden_act", "gelu"),
    )


class Pixtral(Family):
    """A Pixtral checkpoint without its weights."""

    name = "pixtral"
    templates = ("mistral",)

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        self.original = is_original(config)
        if self.original:
            _check_params(checkpoint)
        else:
            _check_features(checkpoint)
        text, self.tower = text_config(config), tower_sizes(config)
        # NOTE: the large one's tokenizer is SentencePiece, and its template a later one.
        large = checkpoint.vocabulary_id("▁") is not None
        self.template = mistral.LARGE if large else mistral.TEMPLATE
        self._read_image_tokens(checkpoint)
        self.context_length = int(text["max_position_embeddings"])
        self.eos_token_ids = end_tokens(checkpoint, text, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, self.tower)
        processor = checkpoint.preprocessor_config
        self.longest = self.tower.longest
        if processor and not self.original:
            _check_processor(checkpoint, self.tower.patch)
            self.longest = _longest(checkpoint)
        if settings.min_pixels is not None:
            raise UserError("model.min_pixels has no meaning for Pixtral models; leave it null.")
        if settings.max_pixels is not None:
            # A square image has this many pixels at most, and others fewer.
            limit = math.isqrt(settings.max_pixels) // self.tower.patch * self.tower.patch
            self.longest = min(self.longest, max(limit, self.tower.patch))
        self.image_mean = tuple(processor.get("image_mean") or CLIP_MEAN)
        self.image_std = tuple(processor.get("image_std") or CLIP_STD)

    def _read_image_tokens(self, checkpoint: Checkpoint) -> None:
        """Ids of an image's patches, of the end of a row and of the end of the image."""
        vision = checkpoint.config.get("vision_encoder") or {}
        patch = vision.get("image_token_id", checkpoint.config.get("image_token_index"))
        self.image_token_id = _token(checkpoint, "[IMG]", patch)
        ends = vision.get("image_break_token_id"), vision.get("image_end_token_id")
        self.break_token_id = _token(checkpoint, "[IMG_BREAK]", ends[0])
        self.end_token_id = _token(checkpoint, "[IMG_END]", ends[1])

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """An image at most `longest` on each side, its sides rounded up to whole patches."""
        ratio = max(height / self.longest, width / self.longest)
        rows, columns = height, width
        if ratio > 1:
            cut = round if self.original else int
            rows, columns = cut(height / ratio), cut(width / ratio)
        if min(rows, columns) < 1:
            raise RowError("bad_aspect_ratio", f"The image is {width}x{height}: too thin a line.")
        patch = self.tower.patch
        rows, columns = -(-rows // patch), -(-columns // patch)
        size = (rows * patch, columns * patch)
        # NOTE: a view keeps the workers from resizing: Mistral's own way of it is not Pillow's.
        views = (View(*size, size),) if self.original else ()
        return ImageLayout(*size, (1, rows, columns), rows * (columns + 1), views)

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        """Rows of patches, each with its end; the last one's ends the image."""
        _, rows, columns = layout.grid
        block = np.full((rows, columns + 1), self.image_token_id, np.int32)
        block[:, -1] = self.break_token_id
        block[-1, -1] = self.end_token_id
        return block.ravel()

    def render(self, turns: Sequence[Turn]) -> tuple[Piece, ...]:
        return render(self.template, [_normalised(turn) for turn in turns])


def _check_params(checkpoint: Checkpoint) -> None:
    """Refuse what later models' params.json has, and Pixtral's never had."""
    for key in _LATER:
        if checkpoint.config.get(key):
            raise UserError(
                f"model.id {checkpoint.id!r}: {key} in its params.json is not supported"
            )


def _check_features(checkpoint: Checkpoint) -> None:
    """Refuse what transformers' class does with its defaults, and Pixtral was not trained for."""
    config = checkpoint.config
    taken = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    act = config.get("projector_hidden_act", "gelu")
    if (taken, strategy, act) != (-1, "full", "gelu"):
        raise UserError(
            f"model.id {checkpoint.id!r}: only Pixtral's own vision_feature_layer -1,"
            ' vision_feature_select_strategy "full" and projector_hidden_act "gelu" are supported;'
            f" its config.json has {taken}, {strategy!r} and {act!r}"
        )


def _check_processor(checkpoint: Checkpoint, patch: int) -> None:
    """Refuse settings that give other pixels than ours."""
    check_steps(checkpoint, BICUBIC)
    processor = checkpoint.preprocessor_config
    if processor.get("do_center_crop"):
        raise refusal(checkpoint, "do_center_crop", True)
    check_size(checkpoint, "patch_size", patch)
    if processor.get("patch_size") is None and patch != _DEFAULT_PATCH:
        raise refusal(checkpoint, "patch_size", None)


def _longest(checkpoint: Checkpoint) -> int:
    """The longer side of an image at most, as the processor's file says."""
    size = checkpoint.preprocessor_config.get("size") or _DEFAULT_LONGEST
    numbers = sides(size, "longest_edge")
    lengths = set(numbers.values())
    if numbers.keys() not in ({"longest_edge"}, {"height", "width"}) or len(lengths) != 1:
        raise refusal(checkpoint, "size", size)
    return int(lengths.pop())


def _token(checkpoint: Checkpoint, name: str, stated: int | None) -> int:
    """The id that the config states, or the tokenizer's."""
    found = checkpoint.token_id(name) if stated is None else stated
    if found is None:
        raise UserError(f"model.id {checkpoint.id!r}: the tokenizer has no {name!r}")
    return int(found)


def _normalised(turn: Turn) -> Turn:
    """As Mistral's code takes a turn: one image after texts comes first, texts are paragraphs."""
    parts = list(turn.parts)
    if turn.role == "assistant" and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip(" ")
    alone = len(parts) > 1 and all(isinstance(part, str) for part in parts[:-1])
    if alone and isinstance(parts[-1], int):
        parts = [parts[-1], *parts[:-1]]
    joined: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            part = "\n\n" + part
        joined.append(part)
    return replace(turn, parts=tuple(joined))


def _sizes(text: Mapping[str, Any], tower: TowerSizes) -> ModelSizes:
    hidden = text["hidden_size"]
    block = 4 * tower.size**2 + 3 * tower.size * tower.inner
    return ModelSizes(
        **decoder_sizes(text, text["tie_word_embeddings"]),
        vision_params=tower.blocks * block,
        projector_params=tower.size * hidden + hidden**2,
        patches_per_token=1,
        vision_width=tower.size,
        vision_full_blocks=tower.blocks,
    )
