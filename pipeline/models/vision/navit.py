"""Pictures of any patch grid for SigLIP's tower (NaViT): patches, and their places in its table.

A patch's learned position is that of the table's cell in which its share of the picture begins.
Knows no resize, no weights and no batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.models.vision.vit import row


@lru_cache(maxsize=4096)
def cells(count: int, side: int) -> np.ndarray:
    """For each of `count` patches of an axis, the cell of `side` in which it begins.

    The reference steps by a float32 that was rounded once; 25 patches of 70 cells show it.
    """
    step = (1 / torch.tensor(count, dtype=torch.int32)).item()
    begins = torch.arange(0, 1 - 1e-6, step)
    edges = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(begins, edges, right=True).numpy()


@lru_cache(maxsize=4096)
def table_rows(rows: int, columns: int, side: int) -> np.ndarray:
    """Row of the position table for each patch of a picture, int64 [rows * columns]."""
    return (cells(rows, side)[:, None] * side + cells(columns, side)).reshape(-1)


def to_patches(
    picture: Tensor, patch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """uint8 [H, W, 3] -> float32 [patches, 3 patch²], row by row; values channel, row, column.

    Arithmetic is the processor's in float32: over 255, minus the mean, over the deviation.
    """
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    pixels = (picture.float() / 255 - row(mean, picture.device)) / row(std, picture.device)
    blocks = pixels.view(rows, patch, columns, patch, 3).permute(0, 2, 4, 1, 3)
    return blocks.reshape(rows * columns, -1)
