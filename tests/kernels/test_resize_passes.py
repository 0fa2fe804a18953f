"""The resize equals the installed Pillow's to the bit, whichever pass Pillow runs first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.kernels.resize import resize

SOURCES = [(301, 117), (101, 300), (64, 64), (256, 192), (60, 300), (9, 7)]
TARGETS = [(308, 112), (112, 308), (56, 28), (140, 140), (28, 308)]


FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(SOURCES, TARGETS)))
def test_equal_to_pillow(source: tuple[int, int], target: tuple[int, int], filter: str) -> None:
    width, height = source
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(target, FILTERS[filter]))
    found = resize(torch.from_numpy(pixels), target[1], target[0], filter)
    assert np.array_equal(found.numpy(), expected)
