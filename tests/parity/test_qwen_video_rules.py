"""Frames and sizes of videos in the Qwen-VL families are those that transformers' processors give.

What these said is recorded; where torchvision is at hand they are asked anew.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RowError
from pipeline.models.families.qwen_vl.frames import VideoRule, patch_times
from pipeline.rows import Clip, VideoInfo
from pipeline.settings import VideoSettings
from tests.helpers import official_video
from tests.parity.qwen_video_cases import cases

RECORD = Path(__file__).resolve().parents[1] / "recorded/qwen_video"
FACTS: list[dict[str, Any]] = json.loads((RECORD / "qwen_video.json").read_text("utf-8"))


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("record_qwen_video", RECORD / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rule(fact: dict[str, Any]) -> VideoRule:
    newer = fact["newer"]
    settings = {**fact["options"], "cap_pixels_per_frame": fact["capped"]}
    return VideoRule.read(settings, newer, 32 if newer else 28, 2)


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f"{f['newer']}-{f['options']}-{f['capped']}")
def test_recorded(fact: dict[str, Any]) -> None:
    rule, digest = _rule(fact), _script().digest
    given = zip(cases(fact["newer"]), fact["found"], strict=True)
    for number, ((info, how), expected) in enumerate(given):
        frames = list(rule.clip(info, VideoSettings(**how)).frames)
        size = rule.size(info, 2 + number % 7, VideoSettings())
        assert [len(frames), digest(frames), *size] == expected, (info, how)


def test_recorded_is_what_the_processors_say_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official_video.need_torchvision()
    monkeypatch.setattr(sys, "argv", ["record.py", str(tmp_path)])
    _script().main()
    assert json.loads((tmp_path / "qwen_video.json").read_text("utf-8")) == FACTS


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_videos(newer: bool, total: int) -> None:
    rule = VideoRule.read({}, newer, 28, 2)
    for settings in (VideoSettings(), VideoSettings(num_frames=8), VideoSettings(max_frames=1)):
        clip = rule.clip(VideoInfo(64, 48, total, 30.0), settings)
        assert clip.frames
        assert max(clip.frames) < total
        assert clip.fps > 0
    assert rule.size(VideoInfo(64, 48, 1, 30.0), 1, VideoSettings()) > (0, 0)


@pytest.mark.parametrize("newer", [False, True])
def test_the_jobs_own_limits(newer: bool) -> None:
    rule, info = VideoRule.read({}, newer, 28, 2), VideoInfo(1280, 720, 3000, 30.0)
    assert len(rule.clip(info, VideoSettings()).frames) == 200
    assert len(rule.clip(info, VideoSettings(max_frames=64)).frames) == 64
    assert len(rule.clip(info, VideoSettings(fps=0.01, min_frames=6)).frames) == 6
    height, width = rule.size(info, 10, VideoSettings(max_pixels=50_000, min_pixels=4000))
    assert height * width <= 50_000
    assert height % 28 == width % 28 == 0


@pytest.mark.parametrize("newer", [False, True])
def test_sides_too_unlike_are_refused(newer: bool) -> None:
    with pytest.raises(RowError) as caught:
        VideoRule.read({}, newer, 28, 2).size(VideoInfo(9000, 30, 9, 3.0), 4, VideoSettings())
    assert caught.value.code == "bad_aspect_ratio"


def test_a_patch_stands_in_the_middle_of_its_frames() -> None:
    clip = Clip((0, 10, 20, 30, 40), 10.0, 1.0)
    assert np.allclose(patch_times(clip, 2), [0.5, 2.5, 4.0])
