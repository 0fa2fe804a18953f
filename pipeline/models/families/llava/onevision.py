"""LLaVA-OneVision: SigLIP tiles, pooled beyond nine; of several images each is one square.

Detection and what differs from the other LLaVAs. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava.config import row_of
from pipeline.models.families.llava.spec import Llava
from pipeline.rows import ImageLayout
from pipeline.settings import ModelSettings


def matches(config: Mapping[str, Any]) -> bool:
    """True for a LLaVA-OneVision checkpoint."""
    return row_of(config) == "llava-onevision"


def build(checkpoint: Checkpoint, settings: ModelSettings) -> LlavaOneVision:
    return LlavaOneVision(checkpoint, settings)


class LlavaOneVision(Llava):
    """A LLaVA-OneVision checkpoint without its weights."""

    name = "llava-onevision"

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """Tiles for an image alone; one square and the newline for each of several."""
        if num_images > 1 and self.config.tiled:
            return self._square(width, height, "pad", newline=self.config.unpads)
        return super().layout(width, height, num_images)
