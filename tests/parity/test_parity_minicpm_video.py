"""Videos in MiniCPM-V 2.6: frames are images one below the other, whose parity is held elsewhere.

The frames' rule and the two slices are those of the model's card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.labeller import Labeller
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.minicpm import spec
from pipeline.models.vision.views import render_views
from pipeline.rows import ImageRef, Row, ShardWork, Turn, VideoInfo
from pipeline.settings import LabelSettings, ModelSettings, VideoSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.minicpm_checkpoint import write_minicpm_v
from tests.helpers.parity import open_ours, random_image
from tests.helpers.pictures import jpeg
from tests.helpers.videos import video

SIZES = [(40, 30), (760, 400), (400, 760)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minicpm_v(tmp_path_factory.mktemp("minicpm"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_a_video_is_its_frames(
    folder: Path, ours: Model, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = ours.family
    width, height = size
    layout = family.video_layout(VideoInfo(width, height, 50, 10.0), VideoSettings(num_frames=3))
    monkeypatch.setattr(family, "max_slices", 2)
    monkeypatch.setattr(family, "image_ids", False)
    image = family.layout(width, height)
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    ids, starts = family.tokenize([Turn("user", (0, "What?"))], [layout], tokenizer)
    frames, places = family.tokenize([Turn("user", (0, 1, 2, "What?"))], [image] * 3, tokenizer)
    assert ids.tolist() == frames.tolist()

    pixels = np.stack([random_image(width, height, seed) for seed in range(3)])
    (block,) = [ours.encode_images([torch.from_numpy(pixels)], [layout])]
    assert len(block) == layout.num_tokens
    assert len(layout.views) == (0 if width < 100 else 2)
    each = ours.encode_images([torch.from_numpy(p) for p in pixels], [image] * 3)
    own = np.concatenate([np.arange(image.num_tokens) + at - starts[0] for at in places])
    torch.testing.assert_close(block[torch.from_numpy(own)], each, rtol=1e-4, atol=1e-5)


def test_frames_in_their_size_already(ours: Model) -> None:
    """What a worker resized is taken as it is, and encoded beside images."""
    family: Any = ours.family
    layout = family.video_layout(VideoInfo(40, 30, 9, 3.0), VideoSettings())
    assert not layout.views
    image = family.layout(70, 90)
    count = len(layout.clip.frames)
    frames = [random_image(layout.width, layout.height, n) for n in range(count)]
    given = [torch.from_numpy(random_image(70, 90)), torch.from_numpy(np.stack(frames))]
    features = ours.encode_images(given, [image, layout])
    assert len(features) == image.num_tokens + layout.num_tokens


def _frames(ours: Model, total: int, rate: float, **rule: Any) -> tuple[int, ...]:
    layout = ours.family.video_layout(VideoInfo(40, 30, total, rate), VideoSettings(**rule))
    assert layout.clip is not None
    return layout.clip.frames


def _of_the_card(total: int, fps: float) -> list[int]:
    """What the model card's example takes: one frame a second, 64 at most."""
    frames = list(range(0, total, round(fps)))
    if len(frames) > 64:
        gap = len(frames) / 64
        frames = [frames[int(i * gap + gap / 2)] for i in range(64)]
    return frames


@pytest.mark.parametrize(("total", "fps"), [(60, 10.0), (900, 29.97), (5000, 25.0), (1921, 30.0)])
def test_frames_are_the_cards(ours: Model, total: int, fps: float) -> None:
    assert list(_frames(ours, total, fps)) == _of_the_card(total, fps)


def test_frames_by_rule(ours: Model) -> None:
    assert _frames(ours, 60, 10.0, fps=2) == tuple(range(0, 60, 5))
    assert _frames(ours, 60, 10.0, num_frames=3) == (10, 30, 50)
    assert _frames(ours, 60, 10.0, fps=2, max_frames=2) == (15, 45)
    assert _frames(ours, 20, 10.0, min_frames=4) == (2, 7, 12, 17)
    assert _frames(ours, 1, 10.0) == (0,)


def test_fewer_pixels_are_no_slices(ours: Model) -> None:
    family: Any = ours.family
    info = VideoInfo(2000, 900, 20, 10.0)
    sliced = family.video_layout(info, VideoSettings())
    whole = family.video_layout(info, VideoSettings(max_pixels=family.side**2))
    assert len(sliced.views) == 2
    assert not whole.views
    assert sliced.num_tokens > whole.num_tokens


@torch.inference_mode()
def test_pictures_that_workers_made(ours: Model) -> None:
    family: Any = ours.family
    layout = family.video_layout(VideoInfo(760, 400, 30, 10.0), VideoSettings(num_frames=3))
    frames = torch.from_numpy(np.stack([random_image(760, 400, seed) for seed in range(3)]))
    made = [
        torch.cat([view.reshape(-1, 3) for view in render_views(frame, layout)]) for frame in frames
    ]
    assert sum(height * width for height, width, _ in layout.packed) == len(made[0])
    whole = ours.encode_images([frames], [layout])
    torch.testing.assert_close(ours.encode_images([torch.stack(made)], [layout]), whole)


def test_rows_run(folder: Path) -> None:
    """Images and videos of a row through the engine, frames with slices."""
    settings = LabelSettings(
        model={"id": str(folder)},
        input={"path": "x", "image": "image", "video": "video"},
        video={"num_frames": 2},
        prompts={"a": "What?", "b": "Why?"},
        generation={"max_new_tokens": 4, "ignore_eos": True},
    )  # type: ignore[arg-type]
    made = (video(8, 4, 760, 400), video(3, 4))
    clips = tuple(ImageRef(data=data, kind="video") for data in made)
    image = ImageRef(data=jpeg(64, 48))
    rows = [Row("r0", 0, {}, (image,), videos=clips[:1]), Row("r1", 1, {}, (image,), videos=clips)]
    labeller = Labeller(settings)
    try:
        answers = list(labeller.label([ShardWork("s", rows)]))
    finally:
        labeller.close()
    assert [answer.error for answer in answers] == [None] * 4
    assert all(answer.num_output_tokens == 4 for answer in answers)
