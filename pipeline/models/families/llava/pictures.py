"""What a LLaVA of transformers' layout says of its pictures in preprocessor_config.json.

How a square is made of an image, and its colours' mean and deviation; what is not made here is
refused. Knows no tile and no tensor. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.processor import BICUBIC, CLIP_MEAN, CLIP_STD, check_size, check_steps, refusal

CLIP = (CLIP_MEAN, CLIP_STD)
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def check(checkpoint: Checkpoint, side: int) -> None:
    """Refuse settings that give other pixels than ours."""
    check_steps(checkpoint, BICUBIC)
    for key in ("size", "crop_size"):
        check_size(checkpoint, key, side)


def square_rule(checkpoint: Checkpoint) -> str:
    """How an image becomes square: pad | crop | squash."""
    processor = checkpoint.preprocessor_config
    if not processor:
        return "crop"
    kind = _kind(processor)
    if processor.get("do_pad") and kind == "llava":
        return "pad"
    size = processor.get("size")
    if isinstance(size, Mapping) and size.get("height") or (size is None and kind == "siglip"):
        return "squash"
    if not processor.get("do_center_crop", kind != "siglip"):
        raise refusal(checkpoint, "do_center_crop", False)
    return "crop"


def colours(
    processor: Mapping[str, Any], tower: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation: as given, else the processor class's; without a file, the tower's."""
    kind = _kind(processor) if processor else tower
    mean, std = SIGLIP if kind == "siglip" else CLIP
    given = processor.get("image_mean") or mean, processor.get("image_std") or std
    return tuple(map(float, given[0])), tuple(map(float, given[1]))


def check_pinpoints(checkpoint: Checkpoint, pinpoints: Sequence[tuple[int, int]]) -> None:
    """The model's and the processor's must be the same, in any order."""
    given = checkpoint.preprocessor_config.get("image_grid_pinpoints")
    if given is not None and {tuple(pair) for pair in given} != set(pinpoints):
        raise refusal(checkpoint, "image_grid_pinpoints", "(not the model's)")


def _kind(processor: Mapping[str, Any]) -> str:
    """llava | clip | siglip: whose processor it is; LLaVA's own where the file does not say."""
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    return next((kind for kind in ("siglip", "clip") if kind in str(named).lower()), "llava")
