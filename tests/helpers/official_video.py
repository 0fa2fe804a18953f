"""transformers' own Qwen video processors, where torchvision's Python code is at hand.

They need no compiled operator of torchvision; where its wheel does not fit this torch, the names
of those operators are declared so that the package can be imported. For tests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.rows import VideoInfo

_OPERATORS = ("nms", "qnms")
_library: list[Any] = []


def need_torchvision() -> None:
    """Import torchvision, or skip the test."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        _declare()


@cache
def _declare() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.append(library)
    import torchvision  # noqa: F401


def processor(newer: bool, **options: Any) -> Any:
    """A video processor with these settings."""
    need_torchvision()
    if newer:
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        return Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **options)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **options)


def frames(official: Any, info: VideoInfo, **rule: Any) -> list[int]:
    """The numbers of the frames that the processor takes."""
    metadata = _metadata(info)
    found = official.sample_frames(metadata, **rule)
    return [int(number) for number in found]


def size(official: Any, info: VideoInfo, num_frames: int) -> tuple[int, int]:
    """Height and width that it resizes the frames to."""
    pixels = torch.zeros(1, num_frames, 1, info.height, info.width, dtype=torch.uint8)
    resized = official.resize(
        pixels, official.size, official.resample, official.patch_size * official.merge_size,
        temporal_factor=2, cap_pixels_per_frame=official.cap_pixels_per_frame,
    )  # fmt: skip
    return int(resized.shape[-2]), int(resized.shape[-1])


def full_processor(folder: Path, kind: str) -> Any:
    """The processor of text, images and videos of one of our test checkpoints."""
    need_torchvision()
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = Qwen2VLImageProcessor.from_pretrained(folder)
    videos = type(processor(kind == "qwen3_vl")).from_pretrained(
        folder, cap_pixels_per_frame=False, do_sample_frames=False
    )
    return _class(kind)(images, tokenizer, videos, chat_template="none")


def _class(kind: str) -> Any:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    classes = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}
    return {**classes, "qwen3_vl": Qwen3VLProcessor}[kind]


def inputs(
    official: Any, text: str, images: list[np.ndarray], videos: list[np.ndarray],
    clips: list[tuple[VideoInfo, tuple[int, ...]]],
) -> Mapping[str, torch.Tensor]:  # fmt: skip
    """What the processor makes of `text` and of videos whose frames were chosen already."""
    metadata = [_metadata(info, list(chosen)) for info, chosen in clips]
    given: dict[str, Any] = {"images": images} if images else {}
    if videos:
        given |= {"videos": videos, "video_metadata": metadata}
    return official(text=[text], return_tensors="pt", **given)


def _metadata(info: VideoInfo, chosen: list[int] | None = None) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=info.num_frames, fps=info.fps, width=info.width, height=info.height,
        duration=info.num_frames / info.fps, frames_indices=chosen,
    )  # fmt: skip
