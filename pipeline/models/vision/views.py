"""The pictures that a family's image processor makes of an image: cut, resized, set on a canvas.

Equal to Pillow's to the bit, by Pillow itself on a CPU and by the resize kernel elsewhere. Knows no
family: which pictures are made, `ImageLayout.views` says.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.kernels.resize import resize
from pipeline.rows import ImageLayout, View

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def render_views(image: Tensor, layout: ImageLayout) -> list[Tensor]:
    """The pictures of uint8 `image` [H, W, 3], in the layout's order."""
    return [render_view(image, view) for view in layout.views]


def render_view(image: Tensor, view: View) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [view.height, view.width, 3]."""
    if view.box is not None:
        left, top, right, bottom = view.box
        image = image[top:bottom, left:right]
    resized = _resize(image, view)
    if view.resized == (view.height, view.width):
        return resized
    shape = (view.height, view.width, 3)
    if len(set(view.fill)) == 1:
        canvas = torch.full(shape, view.fill[0], dtype=torch.uint8, device=image.device)
    else:
        canvas = torch.stack(
            [torch.full(shape[:2], v, dtype=torch.uint8, device=image.device) for v in view.fill],
            dim=-1,
        )
    (top, left), (height, width) = view.offset, view.resized
    canvas[top : top + height, left : left + width] = resized
    return canvas


def _resize(image: Tensor, view: View) -> Tensor:
    height, width = view.resized
    if tuple(image.shape[:2]) == view.resized:
        return image
    if image.is_cuda:
        return resize(image.contiguous(), height, width, view.filter)
    picture = Image.fromarray(image.contiguous().numpy())
    resized = picture.resize((width, height), _PILLOW[view.filter])
    return torch.from_numpy(np.array(resized))
