"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): detection, layouts, M-RoPE positions.

Everything is read from the checkpoint's own JSON; `variant` says which of the three it is. The
weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.qwen_vl.frames import VideoRule, patch_times, smart_resize
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.models.processor import BICUBIC, CLIP_MEAN, CLIP_STD, check_steps
from pipeline.rows import ImageLayout, PlacedImage, VideoInfo
from pipeline.settings import ModelSettings, VideoSettings
from pipeline.templates import qwen2_vl

if TYPE_CHECKING:
    from pipeline.tokenizer import Tokenizer

VARIANTS = {
    "Qwen2VLForConditionalGeneration": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5",
    "Qwen3VLForConditionalGeneration": "qwen3",
}
_MODEL_TYPES = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3"}
_QWEN3_NAMES = ("Qwen3VLForConditionalGeneration", "qwen3_vl")
# What transformers' text configs take for a key that a file leaves out.
_QWEN2_TEXT = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,  # where `use_sliding_window` says so
}
_QWEN3_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
}
_HALF = (0.5, 0.5, 0.5)
_QWEN3_SIZE = {"shortest_edge": 65_536, "longest_edge": 16_777_216}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's keys: nested in newer files, at the top in the original ones.

    Where they are nested, keys of the same name at the top say nothing, as in transformers.
    """
    nested = config.get("text_config")
    return {**_text_defaults(config), **(config if nested is None else nested)}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding; files say so at the top or in the text's part."""
    parts = (config, text_config(config))
    return any(bool(part.get("tie_word_embeddings")) for part in parts)


def _text_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [*(config.get("architectures") or ()), str(config.get("model_type"))]
    return _QWEN3_TEXT if any(name in _QWEN3_NAMES for name in names) else _QWEN2_TEXT


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


class QwenVL(Family):
    """A Qwen-VL checkpoint without its weights."""

    name = "qwen-vl"
    templates = ("qwen2-vl",)
    takes = frozenset({"image", "video"})
    num_axes = 3

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        text = text_config(config)
        variant = variant_of(config)
        assert variant is not None
        self.variant = variant
        self.template = qwen2_vl.QWEN3 if variant == "qwen3" else qwen2_vl.TEMPLATE
        self.image_token_id = int(config.get("image_token_id", 151655))
        self.video_token_id = int(config.get("video_token_id", 151656))
        self.frame_start_id = int(config.get("vision_start_token_id", 151652))
        self.frame_end_id = int(config.get("vision_end_token_id", 151653))
        self.tokens_per_second = config["vision_config"].get("tokens_per_second", 4)
        self._checkpoint = checkpoint
        self._tokenizer: Tokenizer | None = None  # for the times between a video's frames
        self.context_length = int(text.get("max_position_embeddings", 32768))
        self.eos_token_ids = end_tokens(checkpoint, {**config, **text}, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, config["vision_config"], variant, is_tied(config))
        self._read_processor(checkpoint, config["vision_config"], settings)

    def _read_processor(
        self, checkpoint: Checkpoint, vision: Mapping[str, Any], settings: ModelSettings
    ) -> None:
        processor = checkpoint.preprocessor_config
        check_steps(checkpoint, BICUBIC)
        newer = self.variant == "qwen3"
        # A file that is there has the defaults of the class, one for all; else the hub's are taken.
        halves = newer and not processor
        size = processor.get("size") or ({} if not halves else _QWEN3_SIZE)
        self.patch_size = int(processor.get("patch_size") or vision.get("patch_size", 14))
        self.merge_size = int(processor.get("merge_size") or vision.get("spatial_merge_size", 2))
        temporal = processor.get("temporal_patch_size") or vision.get("temporal_patch_size", 2)
        self.temporal_patch_size = int(temporal)
        self.image_mean = tuple(processor.get("image_mean") or (_HALF if halves else CLIP_MEAN))
        self.image_std = tuple(processor.get("image_std") or (_HALF if halves else CLIP_STD))
        self.min_pixels = settings.min_pixels or int(
            processor.get("min_pixels")
            or size.get("shortest_edge")
            or size.get("min_pixels")
            or 56 * 56
        )
        self.max_pixels = settings.max_pixels or int(
            processor.get("max_pixels")
            or size.get("longest_edge")
            or size.get("max_pixels")
            or 28 * 28 * 1280
        )
        videos = checkpoint.video_preprocessor_config
        self._check_images(vision)
        self._check_videos(checkpoint)
        self.video_rule = VideoRule.read(videos, newer, self.factor, self.temporal_patch_size)

    def _check_images(self, vision: Mapping[str, Any]) -> None:
        """The processor's sizes are the tower's."""
        names = ("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")
        for key, name in (*names, ("temporal_patch_size", "temporal_patch_size")):
            own, given = getattr(self, key), vision.get(name)
            if own < 1 or (given is not None and given != own):
                raise UserError(
                    f"preprocessor_config.json: {key} is {own}, the image tower's is {given}"
                )
        if min(self.min_pixels, self.max_pixels) < 1:
            raise UserError("preprocessor_config.json: the bounds of an image's pixels are below 1")

    def _check_videos(self, checkpoint: Checkpoint) -> None:
        """Frames are cut and normalised as images are."""
        check_steps(checkpoint, BICUBIC, videos=True)
        processor = checkpoint.video_preprocessor_config
        for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
            given, own = processor.get(key), getattr(self, key)
            if given is not None and (tuple(given) if isinstance(given, list) else given) != own:
                raise UserError(f"The processors disagree: {key} is {own}, and {given} for videos.")

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

    def video_layout(self, info: VideoInfo, settings: VideoSettings) -> ImageLayout:
        clip = self.video_rule.clip(info, settings)
        rows, columns = self.video_rule.size(info, len(clip.frames), settings)
        patches = -(-len(clip.frames) // self.temporal_patch_size)
        layout = ImageLayout(
            height=rows,
            width=columns,
            grid=(patches, rows // self.patch_size, columns // self.patch_size),
            num_tokens=patches * (rows // self.factor) * (columns // self.factor),
            clip=clip,
        )
        if self.variant != "qwen3":
            return layout
        return replace(layout, num_tokens=len(self.image_tokens(layout)))

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        """Ids of the block; Qwen3-VL writes the time before each temporal patch of a video."""
        if layout.clip is None:
            return super().image_tokens(layout)
        if self.variant != "qwen3":
            return np.full(layout.num_tokens, self.video_token_id, np.int32)
        units = layout.grid[1] * layout.grid[2] // self.merge_size**2
        frame = [self.frame_start_id, *[self.video_token_id] * units, self.frame_end_id]
        chunks: list[np.ndarray] = []
        for seconds in patch_times(layout.clip, self.temporal_patch_size):
            chunks += [self._text_ids(f"<{seconds:.1f} seconds>"), np.array(frame, np.int32)]
        return np.concatenate(chunks)

    def _text_ids(self, text: str) -> np.ndarray:
        from pipeline.tokenizer import Tokenizer

        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._checkpoint, self.control)
        return self._tokenizer.ids(text)

    def positions(
        self, tokens: np.ndarray, images: Sequence[PlacedImage]
    ) -> tuple[np.ndarray, int]:
        """M-RoPE: text advances all axes by one a token, an image or video by its longer side.

        As in transformers, text after a video, and the answer, do not wait for its time axis.
        """
        positions = np.empty((self.num_axes, len(tokens)), np.int32)
        index = position = 0
        for image in images:
            rows = image.layout.grid[1] // self.merge_size
            columns = image.layout.grid[2] // self.merge_size
            for start, times in self._runs(tokens, image, rows * columns):
                text = start - index
                positions[:, index:start] = np.arange(position, position + text)
                position += text
                index = start + len(times) * rows * columns
                block = positions[:, start:index].reshape(self.num_axes, len(times), rows, columns)
                block[0] = position + times[:, None, None]
                block[1] = position + np.arange(rows)[:, None]
                block[2] = position + np.arange(columns)
                position += max(rows, columns)
        rest = len(tokens) - index
        positions[:, index:] = np.arange(position, position + rest)
        return positions, position + rest

    def _runs(
        self, tokens: np.ndarray, image: PlacedImage, num_units: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(start, position of each temporal patch) of the block's runs of image tokens."""
        layout, start = image.layout, image.start
        still = np.zeros(1, np.int64)
        if layout.clip is None:
            yield start, still
        elif self.variant == "qwen3":
            block = tokens[start : start + layout.num_tokens] == self.video_token_id
            for first in np.flatnonzero(block)[::num_units]:
                yield start + int(first), still
        else:
            yield start, self._patch_positions(layout)

    def _patch_positions(self, layout: ImageLayout) -> np.ndarray:
        """Qwen2-VL counts temporal patches, Qwen2.5-VL their time. In float32, as transformers."""
        patches = np.arange(layout.grid[0])
        if self.variant == "qwen2" or layout.clip is None:
            return patches
        seconds = np.float32(self.temporal_patch_size / layout.clip.fps)
        interval = np.float32(self.tokens_per_second) * seconds
        return (patches.astype(np.float32) * interval).astype(np.int64)


def _sizes(
    text: Mapping[str, Any], vision: Mapping[str, Any], variant: str, tied: bool
) -> ModelSizes:
    width = vision.get("embed_dim") if variant == "qwen2" else vision.get("hidden_size")
    width = int(width or 1280)
    inner = int(vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4))
    matrices = 3 if variant == "qwen2_5" else 2
    depth = int(vision.get("depth", 32))
    merged = width * vision.get("spatial_merge_size", 2) ** 2
    deep = len(vision.get("deepstack_visual_indexes", range(3))) if variant == "qwen3" else 0
    return ModelSizes(
        **decoder_sizes(text, tied),
        vision_params=depth * (4 * width * width + matrices * width * inner),
        projector_params=(1 + deep) * merged * (merged + text["hidden_size"]),
        patches_per_token=vision.get("spatial_merge_size", 2) ** 2,
        vision_width=width,
        vision_full_blocks=len(vision.get("fullatt_block_indexes", range(depth))),
    )
