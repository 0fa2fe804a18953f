"""A view equals what Pillow makes with crop, resize and paste."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.models.vision.views import render_view
from pipeline.rows import View

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
VIEWS = [
    View(64, 64, (64, 64), filter="bilinear"),
    View(64, 80, (55, 80), (4, 0), (127, 127, 127)),
    View(90, 200, (90, 130), (0, 35), (122, 116, 104)),
    View(30, 30, (30, 20), (0, 5), (1, 2, 3), (10, 20, 70, 80), "lanczos"),
    View(40, 40, (40, 57), (0, -8)),
    View(70, 40, (61, 88), (4, -24), (9, 8, 7)),
    View(56, 56, (56, 56), fill=(122, 116, 104), box=(0, -20, 130, 110)),
    View(28, 28, (28, 28), fill=(127, 127, 127), box=(-40, -9, 170, 99), filter="bilinear"),
    View(200, 300, (200, 300), fill=(1, 2, 3), box=(-1, 0, 150, 90)),
    View(10, 10, (10, 10), fill=(5, 6, 7), box=(200, 200, 300, 300)),
    View(20, 12, (20, 12), fill=(5, 6, 7), box=(-3000, 0, 3130, 90)),
]


@pytest.mark.parametrize("view", VIEWS)
def test_equal_to_pillow(view: View) -> None:
    left, top, right, bottom = view.box or (0, 0, 130, 90)
    picture = Image.new("RGB", (right - left, bottom - top), view.fill)
    picture.paste(Image.fromarray(PIXELS), (-left, -top))
    height, width = view.resized
    picture = picture.resize((width, height), Image.Resampling[view.filter.upper()])
    canvas = Image.new("RGB", (view.width, view.height), view.fill)
    canvas.paste(picture, (view.offset[1], view.offset[0]))
    found = render_view(torch.from_numpy(PIXELS.copy()), view)
    assert np.array_equal(found.numpy(), np.asarray(canvas))
