"""Sizes in the Qwen-VL families, and which frames of a video are taken and when they stand.

The numbers are those of each checkpoint's own video processor, under the rules of transformers'
Qwen2VLVideoProcessor and Qwen3VLVideoProcessor. Knows no token and no position. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import RowError
from pipeline.rows import Clip, VideoInfo
from pipeline.settings import VideoSettings

_MAX_RATIO = 200
_FPS = 2.0
_SPARE = 1.05  # a frame's share of the pixels is never below as much of the least area
_BUDGET = 0.9  # of the context, for a video's pixels


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The official resize rule: multiples of `factor`, area in bounds, ratio nearly kept."""
    _check_ratio(height, width)
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


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > _MAX_RATIO:
        message = f"It is {width}x{height}; the model takes sides of at most {_MAX_RATIO} to 1."
        raise RowError("bad_aspect_ratio", message)


@dataclass(frozen=True)
class VideoRule:
    """What a checkpoint's video processor does."""

    newer: bool  # Qwen3-VL: areas count over all frames, and the last frame is taken
    factor: int
    temporal: int
    min_pixels: int
    max_pixels: int
    fps: float
    min_frames: int
    max_frames: int
    capped: bool
    max_tokens: int
    num_frames: int | None = None

    @classmethod
    def read(
        cls, processor: Mapping[str, Any], newer: bool, factor: int, temporal: int
    ) -> VideoRule:
        """From the JSON of the video processor, or of the image processor where there is none."""
        size = processor.get("size") or {}
        side = 32 if newer else 28
        least = None if newer else processor.get("min_pixels")
        most = None if newer else processor.get("max_pixels")
        return cls(
            newer=newer,
            factor=factor,
            temporal=temporal,
            min_pixels=int(least or size.get("shortest_edge") or 128 * side * side),
            max_pixels=int(most or size.get("longest_edge") or 768 * side * side),
            fps=float(processor.get("fps") or _FPS),
            min_frames=int(processor.get("min_frames") or 4),
            max_frames=int(processor.get("max_frames") or 768),
            capped=bool(processor.get("cap_pixels_per_frame")),
            max_tokens=int(processor.get("max_video_tokens") or (768 if newer else 128_000)),
            num_frames=None if newer else processor.get("num_frames"),
        )

    def clip(self, info: VideoInfo, settings: VideoSettings) -> Clip:
        """The frames that are taken."""
        rule = replace(
            self,
            fps=settings.fps or self.fps,
            min_frames=settings.min_frames or self.min_frames,
            max_frames=settings.max_frames or self.max_frames,
        )
        choose = rule._even if self.newer else rule._paired
        frames = choose(info, settings.num_frames or (None if settings.fps else self.num_frames))
        return Clip(frames, info.fps, len(frames) / info.num_frames * info.fps)

    def size(self, info: VideoInfo, num_frames: int, settings: VideoSettings) -> tuple[int, int]:
        """Height and width of the frames, each a multiple of `factor`."""
        least = settings.min_pixels or self.min_pixels
        if not self.newer:
            most = settings.max_pixels or self.max_pixels
            if self.capped:
                budget = int(self.max_tokens * self.factor**2 * _BUDGET)
                share = budget * self.temporal // num_frames
                most = max(min(most, share), int(least * _SPARE))
            return smart_resize(info.height, info.width, self.factor, least, most)
        num_frames = max(num_frames, self.temporal)
        most = self.max_pixels
        if settings.max_pixels:
            most = min(most, settings.max_pixels * num_frames)
        if self.capped:
            cap = min(self.max_tokens * self.factor**2, most // num_frames)
            most = max(cap, int(least * _SPARE)) * num_frames
        return self._volume(info, num_frames, least, most)

    def _volume(self, info: VideoInfo, num_frames: int, least: int, most: int) -> tuple[int, int]:
        """As `smart_resize`, the area counted over all frames."""
        height, width, factor = info.height, info.width, self.factor
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        _check_ratio(height, width)
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        area = round(num_frames / self.temporal) * self.temporal * rows * columns
        if area > most:
            shrink = math.sqrt(num_frames * height * width / most)
            rows = max(factor, math.floor(height / shrink / factor) * factor)
            columns = max(factor, math.floor(width / shrink / factor) * factor)
        elif area < least:
            grow = math.sqrt(least / (num_frames * height * width))
            rows = math.ceil(height * grow / factor) * factor
            columns = math.ceil(width * grow / factor) * factor
        return rows, columns

    def _paired(self, info: VideoInfo, num_frames: int | None) -> tuple[int, ...]:
        """Qwen2-VL and Qwen2.5-VL: whole temporal patches of frames, a step apart from the first.

        Where the video has fewer frames than asked for, as many as it has.
        """
        total, unit = info.num_frames, self.temporal
        if total < unit:
            return tuple(range(total))
        most = math.floor(min(self.max_frames, total) / unit) * unit
        if num_frames is not None:
            count = min(round(num_frames / unit) * unit, total // unit * unit)
        else:
            wanted = min(max(total / info.fps * self.fps, self.min_frames), most, total)
            count = math.floor(wanted / unit) * unit
        step = total / max(count, unit)
        # NOTE: rounded to float32 first, as the processor's arange is.
        return tuple(np.arange(0, total, step).astype(np.float32).astype(int).tolist())

    def _even(self, info: VideoInfo, num_frames: int | None) -> tuple[int, ...]:
        """Qwen3-VL: evenly from the first frame to the last; where too few, some repeatedly."""
        total = info.num_frames
        wanted = max(int(total / info.fps * self.fps), self.min_frames)
        count = num_frames or min(wanted, self.max_frames, total)
        return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())


def patch_times(clip: Clip, temporal: int) -> list[float]:
    """Seconds of each temporal patch: the middle between its first and its last frame."""
    times = list(clip.times)
    times += times[-1:] * (-len(times) % temporal)
    return [(times[i] + times[i + temporal - 1]) / 2 for i in range(0, len(times), temporal)]
