"""The pictures that a family's image processor makes of an image: cut, resized, set on a canvas.

Equal to Pillow's to the bit, by Pillow itself on a CPU and by the resize kernel elsewhere. Knows no
family: which pictures are made, `ImageLayout.views` says.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.kernels.resize import pass_order, resize, resize_axis_beyond
from pipeline.rows import ImageLayout, View

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def render_views(image: Tensor, layout: ImageLayout) -> list[Tensor]:
    """The pictures of uint8 `image` [H, W, 3], in the layout's order."""
    return [render_view(image, view) for view in layout.views]


def resize_frames(frames: Tensor, layout: ImageLayout) -> Tensor:
    """A video's frames [F, H, W, 3] in the layout's size, which they mostly have already."""
    size = layout.height, layout.width
    if tuple(frames.shape[1:3]) == size:
        return frames
    return torch.stack([_resize(frame, size, "bicubic") for frame in frames])


def render_view(image: Tensor, view: View) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [view.height, view.width, 3]."""
    resized = _resize(image, view.resized, view.filter) if view.box is None else _cut(image, view)
    if view.resized == (view.height, view.width):
        return resized
    (top, left), (height, width) = view.offset, view.resized
    # What an offset moves off the canvas is cut away.
    shown = resized[max(0, -top) : view.height - top, max(0, -left) : view.width - left]
    if shown.shape[:2] == (view.height, view.width):
        return shown
    canvas = _colour(view.fill, image.device).expand(view.height, view.width, 3).contiguous()
    canvas[max(0, top) : top + height, max(0, left) : left + width] = shown
    return canvas


def _cut(image: Tensor, view: View) -> Tensor:
    """The view's box of `image`, resized; beyond the image's edges the box is the fill colour."""
    assert view.box is not None
    left, top, right, bottom = view.box
    if min(left, top) >= 0 and bottom <= image.shape[0] and right <= image.shape[1]:
        return _resize(image[top:bottom, left:right], view.resized, view.filter)
    spans = ((top, bottom - top), (left, right - left))
    fill = _colour(view.fill, image.device)
    for axis in pass_order((spans[0][1], spans[1][1]), view.resized):
        start, size = spans[axis]
        if start >= 0 and start + size <= image.shape[axis]:
            target = [image.shape[0], image.shape[1]]
            target[axis] = view.resized[axis]
            inside = image.narrow(axis, start, size)
            image = _resize(inside, (target[0], target[1]), view.filter)
        else:
            out = view.resized[axis]
            image = resize_axis_beyond(image, axis, spans[axis], out, fill, view.filter)
    return image


@lru_cache(maxsize=64)
def _colour(fill: tuple[int, int, int], device: torch.device) -> Tensor:
    # NOTE: made once; a copy from the host at each call would wait for the device.
    return torch.tensor(fill, dtype=torch.uint8).to(device)


def _resize(image: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    height, width = size
    if tuple(image.shape[:2]) == size:
        return image
    if image.is_cuda:
        return resize(image.contiguous(), height, width, filter)
    picture = Image.fromarray(image.contiguous().numpy())
    resized = picture.resize((width, height), _PILLOW[filter])
    return torch.from_numpy(np.array(resized))
