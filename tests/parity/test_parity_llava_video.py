"""Videos in LLaVA-OneVision: transformers' tokens, logits, greedy tokens and frames."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.models.base import Model
from pipeline.rows import VideoInfo
from pipeline.settings import VideoSettings
from tests.helpers.llava_checkpoint import KINDS, image_id, write_original, write_twin
from tests.helpers.parity import (
    Prompt,
    difference,
    open_found,
    our_logits,
    our_tokens,
    random_image,
    random_text,
)

KIND, TOLERANCE = "onevision", 1e-4
VIDEO_ID = KINDS[KIND].vocabulary - 2
INFO = VideoInfo(70, 31, 60, 10.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def _folder(folders: Path, twin: bool) -> Path:
    return (write_twin if twin else write_original)(folders / f"ov-{twin}", KIND)


@cache
def _ours(folders: Path, twin: bool) -> Model:
    return open_found(_folder(folders, twin))


@cache
def _theirs(folders: Path) -> Any:
    path = _folder(folders, True)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def _prompt(model: Model, settings: VideoSettings, videos: int = 1) -> Prompt:
    family, tokens, starts = model.family, random_text(5), []
    layout = family.video_layout(INFO, settings)
    assert layout.clip is not None
    clips = []
    for number in range(videos):
        starts.append(len(tokens))
        tokens += [*family.image_tokens(layout).tolist(), *random_text(4, number + 1)]
        frames = [random_image(layout.width, layout.height, f + number) for f in layout.clip.frames]
        clips.append(np.stack(frames))
    array = np.array(tokens, np.int32)
    return Prompt(array, tuple(clips), (layout,) * videos, tuple(starts))


def _their_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(prompt.tokens).long()[None]
    tokens[0, torch.from_numpy(prompt.where)] = VIDEO_ID
    pixels = torch.from_numpy(np.stack(prompt.images)).float().permute(0, 1, 4, 2, 3)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values_videos": (pixels / 255 - 0.5) / 0.5,
    }


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize(("count", "videos"), [(1, 1), (4, 1), (3, 2)])
@torch.inference_mode()
def test_logits(folders: Path, twin: bool, count: int, videos: int) -> None:
    ours = _ours(folders, twin)
    prompt = _prompt(ours, VideoSettings(num_frames=count), videos)
    theirs = _theirs(folders)(**_their_inputs(prompt)).logits[0]
    assert difference(our_logits(ours, prompt), theirs) < TOLERANCE


@torch.inference_mode()
def test_greedy_tokens(folders: Path) -> None:
    ours = _ours(folders, True)
    prompt = _prompt(ours, VideoSettings(fps=1))
    given = _their_inputs(prompt)
    made = _theirs(folders).generate(
        **given, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert our_tokens(ours, prompt, 10) == made[0, given["input_ids"].shape[1] :].tolist()


def test_ids_of_the_block(folders: Path) -> None:
    for twin, expected in ((True, VIDEO_ID), (False, None)):
        family: Any = _ours(folders, twin).family
        layout = family.video_layout(INFO, VideoSettings(num_frames=3))
        ids = set(family.image_tokens(layout).tolist())
        assert ids == {family.image_token_id if expected is None else expected}
        assert layout.num_tokens == 3 * layout.grid[1] ** 2 + 1
    assert image_id(KIND) != VIDEO_ID


@pytest.mark.parametrize(
    ("total", "rule", "original", "converted"),
    [
        (60, {"num_frames": 4}, (0, 19, 39, 59), (0, 15, 30, 45)),
        (60, {"fps": 1}, (0, 11, 23, 35, 47, 59), (0, 10, 20, 30, 40, 50)),
        (60, {"fps": 1, "max_frames": 2}, (0, 59), (0, 30)),
        (3, {}, (0, 1, 2), (0, 1, 2)),
        (1, {"fps": 1}, (0,), (0,)),
    ],
)
def test_frames(
    folders: Path, total: int, rule: dict[str, Any], original: Any, converted: Any
) -> None:
    info = VideoInfo(70, 31, total, 10.0)
    for twin, expected in ((False, original), (True, converted)):
        layout = _ours(folders, twin).family.video_layout(info, VideoSettings(**rule))
        assert layout.clip is not None
        assert layout.clip.frames == expected


def test_frames_are_transformers(folders: Path) -> None:
    """Its own rule for a clip that is loaded by number or by rate."""
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    family = _ours(folders, True).family
    for total in (7, 60, 61, 333):
        info = VideoInfo(70, 31, total, 12.5)
        metadata = VideoMetadata(total_num_frames=total, fps=12.5)
        for rule in ({"num_frames": 5}, {"fps": 1.0}, {"fps": 0.3}):
            layout = family.video_layout(info, VideoSettings(**rule))
            assert layout.clip is not None
            theirs = default_sample_indices_fn(metadata, **rule)  # type: ignore[arg-type]
            assert list(layout.clip.frames) == list(theirs)
