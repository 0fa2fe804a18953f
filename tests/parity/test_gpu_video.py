"""On a GPU videos become what they become on a CPU: patches, marks between frames, pooling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.rows import VideoInfo
from pipeline.settings import VideoSettings
from tests.helpers.checkpoints import WRITERS
from tests.helpers.llava_checkpoint import write_original
from tests.helpers.minicpm_checkpoint import write_minicpm_v
from tests.helpers.parity import difference, open_found, random_image

pytestmark = pytest.mark.gpu
MAKERS: dict[str, Callable[[Path], Path]] = {
    **WRITERS,
    "onevision": lambda folder: write_original(folder, "onevision"),
    "minicpm": write_minicpm_v,
}


@pytest.mark.parametrize("name", MAKERS)
@torch.inference_mode()
def test_features_equal_the_cpus(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path / "model")
    cpu, gpu = open_found(folder), open_found(folder, "cuda")
    family: Any = cpu.family
    size = (760, 400) if name == "minicpm" else (190, 130)  # two slices a frame
    layouts = [
        family.video_layout(VideoInfo(*size, 50, 10.0), VideoSettings(num_frames=4)),
        family.layout(*size, 2),
        family.video_layout(VideoInfo(*size, 50, 10.0), VideoSettings(num_frames=2)),
    ]
    frames = [np.stack([random_image(*size, n) for n in range(count)]) for count in (4, 2)]
    pictures = [frames[0], random_image(*size, 9), frames[1]]
    found = [
        model.encode_images([torch.from_numpy(p).to(model.device) for p in pictures], layouts)
        for model in (gpu, cpu)
    ]
    assert len(found[0]) == sum(layout.num_tokens for layout in layouts)
    assert difference(found[0].cpu(), found[1]) < 1e-4
