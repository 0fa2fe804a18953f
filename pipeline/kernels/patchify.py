"""Images to normalised patches in the order of the Qwen processors.

Patches stand in merge groups (rows of `merge` x `merge` blocks); a patch's values are ordered
channel, frame, row, column, and a still image is repeated over the `temporal` frames. Knows no
resize. Source: transformers' Qwen2VLImageProcessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def patchify(
    images: Sequence[Tensor],
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """uint8 images [h, w, 3], sides multiples of patch * merge -> [N, 3 * temporal * patch²].

    Arithmetic is the processor's in float32: `x * (1/255)`, minus the mean, over the deviation.
    """
    device = images[0].device
    mean_row, std_row = _constant(tuple(mean), device), _constant(tuple(std), device)
    blocks = torch.cat([_order(image, patch, merge) for image in images])  # [N, p, p, 3]
    pixels = (blocks.float() * (1.0 / 255.0) - mean_row) / std_row
    pixels = pixels.to(dtype).permute(0, 3, 1, 2)[:, :, None]
    return pixels.expand(-1, -1, temporal, -1, -1).reshape(len(blocks), -1)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # NOTE: made once; a copy from the host at each call would wait for the device.
    return torch.tensor(values, dtype=torch.float32).to(device)


def _order(image: Tensor, patch: int, merge: int) -> Tensor:
    rows, columns = image.shape[0] // (patch * merge), image.shape[1] // (patch * merge)
    blocks = image.view(rows, merge, patch, columns, merge, patch, 3)
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch, patch, 3)
