"""Qwen's image towers: a batch equals its images alone, tables equal transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.models.families.qwen_vl import spec
from pipeline.models.vision.grids import interpolation, patch_positions, window_units
from pipeline.models.vision.plan import KEPT_PLANS, Planner
from tests.helpers.checkpoints import WRITERS
from tests.helpers.parity import open_ours, random_image

GRIDS = [(1, 8, 22), (1, 2, 2), (1, 16, 16), (1, 18, 10), (2, 6, 34)]
SIZES = [(224, 168), (61, 343), (224, 168), (9, 7), (500, 100)]


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_a_batch_equals_its_images(kind: str, tmp_path: Path) -> None:
    model = open_ours(WRITERS[kind](tmp_path), spec.build)
    images = [torch.from_numpy(random_image(w, h, i)) for i, (w, h) in enumerate(SIZES)]
    layouts = [model.family.layout(w, h) for w, h in SIZES]
    together = model.encode_images(images, layouts)
    alone = [model.encode_images([i], [x]) for i, x in zip(images, layouts, strict=True)]
    assert together.shape == (sum(x.num_tokens for x in layouts), model.feature_size)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_an_image_may_come_resized(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    model = open_ours(WRITERS[kind](tmp_path), spec.build)
    image = random_image(301, 117)
    layout = model.family.layout(301, 117)
    size = (layout.width, layout.height)
    resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    first = model.encode_images([torch.from_numpy(image)], [layout])
    assert torch.equal(first, model.encode_images([torch.from_numpy(resized)], [layout]))


def test_positions_and_windows_equal_transformers() -> None:
    from transformers import vision_utils

    for grid in GRIDS:
        thw = torch.tensor([grid])
        ids = vision_utils.get_vision_position_ids(thw, 2)
        assert np.array_equal(patch_positions(grid, 2).T, ids.numpy())
        index, ends = vision_utils.get_vision_window_index(thw, 2, 112, 14)
        order, sizes = window_units(grid, 2, 4)
        assert np.array_equal(order, index.numpy())
        lengths = np.diff(ends.numpy())
        assert np.array_equal(sizes * 4, np.repeat(lengths, lengths // 4))


def test_interpolation_equals_transformers() -> None:
    from transformers import vision_utils

    for grid in GRIDS:
        index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
            torch.tensor([grid]), 7, align_corners=True, spatial_merge_size=2
        )
        ours = interpolation(grid, 2, 7)
        assert np.array_equal(ours[0], index.numpy())
        assert np.array_equal(ours[1], weight.numpy())


def test_windows_stand_in_their_image_side_by_side_by_size() -> None:
    grids = [GRIDS[0], GRIDS[3], GRIDS[2]]
    plan = Planner(2, torch.zeros(1), window=4).plan(grids)
    assert plan.windows is not None
    assert plan.order is not None
    assert plan.inverse is not None
    windows = plan.windows.dense
    assert windows is not None
    assert windows.num_tokens == plan.images.num_tokens == 4 * len(plan.order)
    assert torch.equal(plan.order[plan.inverse], torch.arange(len(plan.order)))
    start = 0
    for grid in grids:
        units = grid[0] * grid[1] * grid[2] // 4
        here = slice(start, start + units)
        assert torch.equal(plan.order[here].sort().values, torch.arange(start, start + units))
        alone = Planner(2, torch.zeros(1), window=4).plan([grid])
        assert alone.order is not None
        assert torch.equal(plan.order[here], alone.order + start)
        start += units


def test_plans_are_kept_and_forgotten() -> None:
    planner = Planner(2, torch.zeros(1))
    first = planner.plan([GRIDS[0]])
    assert planner.plan([GRIDS[0]]) is first
    for rows in range(KEPT_PLANS):
        planner.plan([(1, 2 * rows + 2, 4)])
    assert planner.plan([GRIDS[0]]) is not first
