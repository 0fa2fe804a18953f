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
]


@pytest.mark.parametrize("view", VIEWS)
def test_equal_to_pillow(view: View) -> None:
    picture = Image.fromarray(PIXELS).crop(view.box or (0, 0, 130, 90))
    height, width = view.resized
    picture = picture.resize((width, height), Image.Resampling[view.filter.upper()])
    canvas = Image.new("RGB", (view.width, view.height), view.fill)
    canvas.paste(picture, (view.offset[1], view.offset[0]))
    found = render_view(torch.from_numpy(PIXELS.copy()), view)
    assert np.array_equal(found.numpy(), np.asarray(canvas))
