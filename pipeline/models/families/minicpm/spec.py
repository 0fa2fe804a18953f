"""MiniCPM-V 2.6: detection, the slices of an image and their markers in the prompt.

An image is an overview, and for larger ones a grid of slices cut from a second resize; each gives
the same number of tokens whatever its size. The weights' side stands in `model.py`. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.rows import Clip, ImageLayout, Turn, VideoInfo, View
from pipeline.settings import ModelSettings, VideoSettings
from pipeline.templates import minicpmv
from pipeline.templates.render import Control, Piece

Size = tuple[int, int]  # width, height
MAX_VIDEO_FRAMES = 64
MAX_FRAME_SLICES = 2  # of a video's frame


def matches(config: Mapping[str, Any]) -> bool:
    """True for MiniCPM-V 2.6; its model_type is shared by versions on other decoders."""
    named = "MiniCPMV" in (config.get("architectures") or ["MiniCPMV"])
    typed = config.get("model_type") == "minicpmv"
    return named and typed and str(config.get("version")) == "2.6" and "query_num" in config


def build(checkpoint: Checkpoint, settings: ModelSettings) -> MiniCPM:
    return MiniCPM(checkpoint, settings)


def _multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def fitted(width: float, height: float, side: int, patch: int, enlarge: bool) -> Size:
    """Multiples of `patch` with the ratio kept and an area of about `side`² at most."""
    if width * height > side * side or enlarge:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def slice_grid(width: int, height: int, side: int, most: int) -> Size | None:
    """Columns and rows of slices: the shape nearest the image's among those of a fitting count."""
    wanted = min(math.ceil(width * height / (side * side)), most)
    if wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
    shapes = [(a, n // a) for n in counts for a in range(1, n + 1) if n % a == 0]
    ratio = math.log(width / height)
    return min(shapes, key=lambda shape: abs(ratio - math.log(shape[0] / shape[1])))


@lru_cache(maxsize=4096)
def image_layout(
    width: int, height: int, side: int, patch: int, most: int, queries: int
) -> ImageLayout:
    """The overview, and where there are slices a second view that they are cut from.

    The layout's grid is that of the slices, without rows and columns where there are none.
    """
    grid = slice_grid(width, height, side, most)
    if grid is None:
        wide, high = fitted(width, height, side, patch, enlarge=True)
        return ImageLayout(high, wide, (1, 0, 0), queries + 2, (_view(wide, high),))
    columns, rows = grid
    wide, high = fitted(width, height, side, patch, enlarge=False)
    parts = _multiple(width, columns) / columns, _multiple(height, rows) / rows
    slice_wide, slice_high = fitted(*parts, side, patch, enlarge=True)
    views = _view(wide, high), _view(slice_wide * columns, slice_high * rows)
    tokens = (1 + columns * rows) * (queries + 2) + rows - 1
    return ImageLayout(high, wide, (1, rows, columns), tokens, views)


def _view(width: int, height: int) -> View:
    return View(height, width, resized=(height, width))


class MiniCPM(Family):
    """A MiniCPM-V 2.6 checkpoint without its weights."""

    name = "minicpm-v"
    takes = frozenset({"image", "video"})
    templates = ("minicpmv",)
    template = minicpmv.TEMPLATE
    transparency = "drop"

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        self.num_queries = int(config["query_num"])
        self.patch_size = int(config["vision_config"]["patch_size"])
        self.context_length = int(config.get("max_position_embeddings", 32768))
        stops = [checkpoint.token_id(token) for token in self.template.stop]
        ends = end_tokens(checkpoint, config, self.template)
        self.eos_token_ids = tuple(dict.fromkeys([*ends, *(i for i in stops if i is not None)]))
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(config)
        if settings.min_pixels is not None:
            raise UserError("model.min_pixels has no meaning for MiniCPM models; leave it null.")
        self._read_processor(checkpoint.preprocessor_config, settings.max_pixels)
        self._read_tokens(checkpoint)

    def _read_processor(self, processor: Mapping[str, Any], max_pixels: int | None) -> None:
        if not processor.get("slice_mode", True):
            raise UserError("preprocessor_config.json: only `slice_mode: true` is known")
        known = {"patch_size": self.patch_size, "image_feature_size": self.num_queries}
        if any(processor.get(key, value) != value for key, value in known.items()):
            raise UserError("preprocessor_config.json: its sizes are not those of config.json")
        self.side = int(processor.get("scale_resolution", 448))
        self.max_slices = int(processor.get("max_slice_nums", 9))
        self.image_ids = bool(processor.get("use_image_id", False))
        self.image_mean = tuple(processor.get("norm_mean") or (0.5, 0.5, 0.5))
        self.image_std = tuple(processor.get("norm_std") or (0.5, 0.5, 0.5))
        if max_pixels is not None:
            if max_pixels < self.side**2:
                raise UserError(
                    f"model.max_pixels {max_pixels} is less than one slice of the model has;"
                    f" write at least {self.side**2}"
                )
            self.max_slices = min(self.max_slices, max_pixels // self.side**2)

    def _read_tokens(self, checkpoint: Checkpoint) -> None:
        names = ("<image>", "</image>", "<slice>", "</slice>", "<unk>")
        found = [checkpoint.token_id(name) for name in names]
        newline = checkpoint.vocabulary_id("Ċ")
        if None in found or newline is None:
            missing = names[found.index(None)] if None in found else "\\n"
            raise UserError(f"model.id {checkpoint.id!r}: tokenizer.json has no token {missing!r}")
        self.image_token_id = found[-1]
        self._markers = tuple(int(i) for i in (*found, newline) if i is not None)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        return image_layout(
            width, height, self.side, self.patch_size, self.max_slices, self.num_queries
        )

    def video_layout(self, info: VideoInfo, settings: VideoSettings) -> ImageLayout:
        """Frames are images one below the other, of at most two slices."""
        frames = chosen_frames(info, settings)
        most = MAX_FRAME_SLICES
        if settings.max_pixels is not None:
            most = min(most, max(1, settings.max_pixels // self.side**2))
        most = min(most, self.max_slices)
        one = image_layout(
            info.width, info.height, self.side, self.patch_size, most, self.num_queries
        )
        return replace(
            one,
            grid=(len(frames), *one.grid[1:]),
            num_tokens=len(frames) * (one.num_tokens + 1) - 1,
            views=one.views if len(one.views) > 1 else (),  # one alone is a plain resize
            clip=Clip(frames, info.fps, len(frames) / info.num_frames * info.fps),
        )

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        """The overview between its markers, then the rows of slices, a newline between two.

        A newline stands between a video's frames too.
        """
        frame = block_tokens((1, *layout.grid[1:]), self.num_queries, self._markers)
        if layout.clip is None:
            return frame
        line = np.append(frame, np.int32(self._markers[-1]))
        return np.tile(line, layout.grid[0])[:-1]

    def pieces(self, turns: Sequence[Turn], layouts: Sequence[ImageLayout]) -> tuple[Piece, ...]:
        return self.numbered(self.render(turns), layouts)

    def numbered(
        self, pieces: Sequence[Piece], layouts: Sequence[ImageLayout]
    ) -> tuple[Piece, ...]:
        """Each image after its number in the conversation; beside a video none has one."""
        found: list[Piece] = []
        seen = 0
        wanted = self.image_ids and all(layout.clip is None for layout in layouts)
        for piece in pieces:
            if isinstance(piece, int) and wanted and layouts[piece].sound is None:
                found += [Control("<image_id>"), str(seen), Control("</image_id>")]
                seen += 1
            found.append(piece)
        return tuple(found)


def chosen_frames(info: VideoInfo, settings: VideoSettings) -> tuple[int, ...]:
    """One frame a second; where those are too many or a count is given, from equal parts' middles.

    A video shorter than its step gives its first frame.
    """
    total = info.num_frames
    if settings.num_frames is not None:
        return _middles(range(total), settings.num_frames)
    step = max(1, round(info.fps / (settings.fps or 1.0)))
    frames = range(0, total, step)
    if len(frames) < (settings.min_frames or 1):
        return _middles(range(total), settings.min_frames or 1)
    return _middles(frames, settings.max_frames or MAX_VIDEO_FRAMES)


def _middles(frames: Sequence[int], most: int) -> tuple[int, ...]:
    if len(frames) <= most:
        return tuple(frames)
    gap = len(frames) / most
    return tuple(frames[int(i * gap + gap / 2)] for i in range(most))


@lru_cache(maxsize=256)
def block_tokens(grid: tuple[int, int, int], queries: int, markers: tuple[int, ...]) -> np.ndarray:
    """Ids of an image's block, read-only."""
    image_start, image_end, slice_start, slice_end, unknown, newline = markers
    _, rows, columns = grid
    row = [slice_start, *[unknown] * queries, slice_end] * columns
    ids = [image_start, *[unknown] * queries, image_end]
    for number in range(rows):
        ids += [newline, *row] if number else row
    block = np.array(ids, np.int32)
    block.setflags(write=False)
    return block


def tower_depth(config: Mapping[str, Any]) -> int:
    """Layers of the image tower that are run and stored."""
    return int(config["vision_config"]["num_hidden_layers"]) - bool(
        config.get("drop_vision_last_layer", True)
    )


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    hidden, vision, depth = config["hidden_size"], config["vision_config"], tower_depth(config)
    width = vision["hidden_size"]
    reading = width * hidden + 2 * hidden * hidden  # of the resampler, on every patch
    return ModelSizes(
        **decoder_sizes(config),
        vision_params=depth * (4 * width * width + 2 * width * vision["intermediate_size"])
        + reading,
        projector_params=3 * hidden * hidden,
        patches_per_token=16,
        patches_per_run=1024,
        vision_width=width,
        vision_full_blocks=depth,
    )
