"""Videos in Qwen2-VL, Qwen2.5-VL and Qwen3-VL: transformers' tokens, positions, pixels, logits.

The processors' side runs where torchvision is at hand; the models' side always.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.kernels.patchify import patchify
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.qwen_vl import model as qwen_model
from pipeline.models.families.qwen_vl import spec
from pipeline.models.families.qwen_vl.model import _sized
from pipeline.rows import Turn, VideoInfo
from pipeline.settings import VideoSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers import official_video
from tests.helpers.checkpoints import WRITERS
from tests.helpers.parity import (
    Prompt,
    difference,
    open_ours,
    our_logits,
    our_tokens,
    random_image,
)
from tests.helpers.tiny_tokenizer import special_ids

TOLERANCE = 1e-4
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
EVEN, ODD = VideoInfo(84, 56, 60, 10.0), VideoInfo(56, 112, 45, 29.97)
LONG = VideoInfo(56, 56, 4000, 25.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def _written(folder: Path, kind: str) -> Path:
    return WRITERS[kind](folder / kind)


@cache
def _ours(folder: Path, kind: str) -> Model:
    return open_ours(_written(folder, kind), spec.build)


@cache
def _theirs(folder: Path, kind: str) -> Any:
    from transformers import AutoModelForImageTextToText

    path = _written(folder, kind)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


# A part is a text, an image's size, or a video with its rule.
Case = list[str | tuple[int, int] | tuple[VideoInfo, VideoSettings]]
CASES: dict[str, Case] = {
    "one video": [(EVEN, VideoSettings(fps=1)), "What is in the video?"],
    "frames by count": ["See: ", (ODD, VideoSettings(num_frames=6)), "Why?"],
    "a long time axis": [(LONG, VideoSettings(fps=0.05, max_frames=8)), "And then?"],
    "fast": [(ODD, VideoSettings(fps=20, max_frames=6)), "How many?"],
    "image, then two videos": [
        (84, 56),
        (EVEN, VideoSettings(num_frames=4)),
        " or ",
        (ODD, VideoSettings(num_frames=2)),
        "Which one!",
    ],
}


class Made:
    """A case as our family prepares it, and its text for the official processor."""

    def __init__(self, model: Model, folder: Path, case: Case) -> None:
        family = model.family
        self.images: list[np.ndarray] = []
        self.videos: list[np.ndarray] = []
        self.clips: list[tuple[VideoInfo, tuple[int, ...]]] = []
        parts, layouts, pixels, text = [], [], [], ""
        for part in case:
            if isinstance(part, str):
                parts.append(part)
                text += part
                continue
            parts.append(len(layouts))
            if isinstance(part[0], VideoInfo):
                layout = family.video_layout(*part)
                assert layout.clip is not None
                frames = [
                    random_image(layout.width, layout.height, seed) for seed in layout.clip.frames
                ]
                pixels.append(np.stack(frames))
                self.videos.append(pixels[-1])
                self.clips.append((part[0], layout.clip.frames))
                text += VIDEO
            else:
                layout = family.layout(*part)
                pixels.append(random_image(layout.width, layout.height, 7))
                self.images.append(pixels[-1])
                text += IMAGE
            layouts.append(layout)
        self.text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        if family.variant != "qwen3":
            self.text = SYSTEM + self.text
        tokenizer = Tokenizer(Checkpoint("test", folder), family.control)
        tokens, starts = family.tokenize([Turn("user", tuple(parts))], layouts, tokenizer)
        self.prompt = Prompt(tokens, tuple(pixels), tuple(layouts), starts)


@cache
def _made(folder: Path, kind: str, name: str) -> Made:
    return Made(_ours(folder, kind), _written(folder, kind), CASES[name])


def _their_inputs(model: Model, made: Made) -> dict[str, torch.Tensor]:
    """The model class's inputs from our ids and patches, without its processor."""
    family, prompt = model.family, made.prompt
    tokens = torch.from_numpy(prompt.tokens).long()[None]
    types = (tokens == family.image_token_id).int() + 2 * (tokens == family.video_token_id).int()
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    given["mm_token_type_ids"] = types
    for name, moving in (("image", False), ("video", True)):
        chosen = [
            (torch.from_numpy(image), layout)
            for image, layout in zip(prompt.images, prompt.layouts, strict=True)
            if (layout.clip is not None) == moving
        ]
        if not chosen:
            continue
        patches = patchify(
            [image for image, _ in chosen], family.patch_size, 2, 2,
            family.image_mean, family.image_std, torch.float32,
        )  # fmt: skip
        given["pixel_values_videos" if moving else "pixel_values"] = patches
        given[f"{name}_grid_thw"] = torch.tensor([layout.grid for _, layout in chosen])
    if family.variant == "qwen2_5" and made.videos:
        rates = [layout.clip.fps for layout in prompt.layouts if layout.clip]
        given["second_per_grid_ts"] = torch.tensor([2 / fps for fps in rates])
    return given


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_processor_gives_the_same_inputs(folders: Path, kind: str, name: str) -> None:
    ours, made = _ours(folders, kind), _made(folders, kind, name)
    official = official_video.full_processor(_written(folders, kind), kind)
    theirs = official_video.inputs(official, made.text, made.images, made.videos, made.clips)
    expected = _their_inputs(ours, made)
    assert theirs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert theirs["mm_token_type_ids"].tolist() == expected["mm_token_type_ids"].tolist()
    for key in expected.keys() & {"video_grid_thw", "image_grid_thw"}:
        assert theirs[key].tolist() == expected[key].tolist()
    for key in expected.keys() & {"pixel_values", "pixel_values_videos", "second_per_grid_ts"}:
        torch.testing.assert_close(
            torch.as_tensor(theirs[key]).float(), expected[key], rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_positions(folders: Path, kind: str, name: str) -> None:
    ours, made = _ours(folders, kind), _made(folders, kind, name)
    given = _their_inputs(ours, made)
    keys = {"input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"}
    keys |= {"second_per_grid_ts"}
    theirs, _ = _theirs(folders, kind).model.get_rope_index(
        **{key: value for key, value in given.items() if key in keys}
    )
    positions, following = ours.family.positions(made.prompt.tokens, made.prompt.placed())
    assert positions.tolist() == theirs[:, 0].tolist()
    assert following == int(theirs[0, 0, -1]) + 1  # where `generate` goes on


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_logits(folders: Path, kind: str, name: str) -> None:
    ours, made = _ours(folders, kind), _made(folders, kind, name)
    theirs = _theirs(folders, kind)(**_their_inputs(ours, made)).logits[0]
    assert difference(our_logits(ours, made.prompt), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_greedy_tokens(folders: Path, kind: str) -> None:
    ours, made = _ours(folders, kind), _made(folders, kind, "a long time axis")
    given = _their_inputs(ours, made)
    made_theirs = _theirs(folders, kind).generate(
        **given, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    theirs = made_theirs[0, given["input_ids"].shape[1] :].tolist()
    assert our_tokens(ours, made.prompt, 12) == theirs


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_long_videos_are_encoded_in_parts(
    folders: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, made = _ours(folders, kind), _made(folders, kind, "image, then two videos")
    pixels = [torch.from_numpy(image) for image in made.prompt.images]
    whole = ours.encode_images(pixels, list(made.prompt.layouts))
    monkeypatch.setattr(qwen_model, "MAX_TOWER_TOKENS", 7)
    parts = ours.encode_images(pixels, list(made.prompt.layouts))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", WRITERS)
def test_resized_pixels_are_within_one_level(folders: Path, kind: str) -> None:
    """torchvision's bicubic of 8-bit frames rounds otherwise than Pillow's, which is ours."""
    ours = _ours(folders, kind)
    family = ours.family
    official = official_video.processor(
        kind == "qwen3_vl", do_sample_frames=False,
        size={"shortest_edge": family.video_rule.min_pixels,
              "longest_edge": family.video_rule.max_pixels},
    )  # fmt: skip
    source = np.stack([random_image(190, 130, seed) for seed in range(4)])
    layout = family.video_layout(VideoInfo(190, 130, 4, 2.0), VideoSettings(num_frames=4))
    theirs = official(videos=[source], return_tensors="pt", return_metadata=False)
    frames = _sized(torch.from_numpy(source), layout)
    patches = patchify(
        [frames], family.patch_size, 2, 2, official.image_mean, official.image_std, torch.float32
    )
    assert theirs["video_grid_thw"].tolist() == [list(layout.grid)]
    levels = (patches - theirs["pixel_values_videos"]).abs() * max(official.image_std) * 255
    assert levels.max() < 1.1  # one level: the channels' deviations differ
    assert levels.mean() < 0.1


def test_stamps_are_the_tokens_of_the_text_between_frames(folders: Path) -> None:
    made = _made(folders, "qwen3_vl", "one video")
    ids = special_ids()
    tokenizer = Tokenizer(Checkpoint("test", _written(folders, "qwen3_vl")))
    text = tokenizer.decode(
        [i for i in made.prompt.tokens.tolist() if i != ids["<|video_pad|>"]], skip_special=False
    )
    assert "<|vision_start|><0.6 seconds><|vision_start|><|vision_end|><3.0 seconds>" in text
