"""LLaVA-OneVision: SigLIP tiles, pooled beyond nine; of several images each is one square.

A video's frames are squares too, pooled to a quarter, with one newline after the last. Detection
and what differs from the other LLaVAs. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava.config import row_of
from pipeline.models.families.llava.spec import Llava
from pipeline.rows import Clip, ImageLayout, VideoInfo
from pipeline.settings import ModelSettings, VideoSettings

_NUM_FRAMES = 16  # as the original's tutorial
_MAX_FRAMES = 32  # that training saw


def matches(config: Mapping[str, Any]) -> bool:
    """True for a LLaVA-OneVision checkpoint."""
    return row_of(config) == "llava-onevision"


def build(checkpoint: Checkpoint, settings: ModelSettings) -> LlavaOneVision:
    return LlavaOneVision(checkpoint, settings)


def _pools_as_here(config: Mapping[str, Any]) -> bool:
    """True where a video's frames are pooled bilinearly, with one newline after the last."""
    mode, newline = config.get("mm_spatial_pool_mode"), config.get("mm_newline_position")
    return mode in (None, "bilinear") and newline in (None, "one_token")


class LlavaOneVision(Llava):
    """A LLaVA-OneVision checkpoint without its weights."""

    name = "llava-onevision"
    takes = frozenset({"image", "video"})

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        super().__init__(checkpoint, settings)
        config = checkpoint.config
        found = config.get("video_token_index", config.get("video_token_id"))
        own = None if self.config.original else found
        if self.config.original and not _pools_as_here(config):
            self.takes = frozenset({"image"})
        self.video_token_id = self.image_token_id if own is None else int(own)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """Tiles for an image alone; one square and the newline for each of several."""
        if num_images > 1 and self.config.tiled:
            return self._square(width, height, "pad", newline=self.config.unpads)
        return super().layout(width, height, num_images)

    def video_layout(self, info: VideoInfo, settings: VideoSettings) -> ImageLayout:
        """`grid` counts the frames, and the rows and columns of each one's features."""
        frames = self._frames(info, settings)
        side, pooled = self.config.tower.side, -(-self.config.tower.grid // 2)
        return ImageLayout(
            height=side,
            width=side,
            grid=(len(frames), pooled, pooled),
            num_tokens=len(frames) * pooled**2 + self.config.unpads,
            clip=Clip(frames, info.fps, len(frames) / info.num_frames * info.fps),
        )

    def _frames(self, info: VideoInfo, settings: VideoSettings) -> tuple[int, ...]:
        """Evenly: the original from the first to the last, transformers from each part's first."""
        total, count = info.num_frames, settings.num_frames or _NUM_FRAMES
        if settings.fps is not None:
            wanted = max(int(total / info.fps * settings.fps), settings.min_frames or 1)
            count = min(wanted, settings.max_frames or _MAX_FRAMES)
        count = min(count, total)
        if self.config.original:
            return tuple(np.linspace(0, total - 1, count, dtype=int).tolist())
        return tuple((np.arange(count) * total // count).tolist())

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        if layout.clip is None:
            return super().image_tokens(layout)
        return np.full(layout.num_tokens, self.video_token_id, np.int32)
