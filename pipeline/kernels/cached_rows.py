"""Keys or values of one layer as the cache holds them: as they are, or in float8 with scales.

A float8 row is one token's key or value of one head, and has a scale of its own, so that a row does
not depend on its neighbours. Knows no layer, no place and no attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.fp8 import FP8, Quantized, quantize_rows_reference

CachedRows = Tensor | Quantized  # [Hk, N, D]; scales are [Hk, N, 1]


def parts(rows: CachedRows) -> tuple[Tensor, Tensor | None]:
    """Values [Hk, N, D], and their scales where there are any."""
    return (rows.values, rows.scale) if isinstance(rows, Quantized) else (rows, None)


def pairs(rows: CachedRows) -> tuple[Tensor, Tensor | None]:
    """As `parts`; two float8 channels stand as one int16, the even one in its low byte."""
    values, scale = parts(rows)
    return (values if scale is None else values.view(torch.int16)), scale


def take_rows(rows: CachedRows, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` at `index` [n] in plain numbers [Hk, n, D]."""
    values, scale = parts(rows)
    if scale is None:
        # NOTE: index_select copies whole rows; indexing with a tensor takes five times as long.
        return values.index_select(1, index)
    picked = values.view(torch.uint8).index_select(1, index).view(FP8)
    return (picked.float() * scale.index_select(1, index)).to(dtype)


def put_rows(rows: CachedRows, places: Tensor, new: Tensor) -> None:
    """Write `new` [T, Hk, D] at `places` [T]."""
    new = new.transpose(0, 1)
    if not isinstance(rows, Quantized):
        rows.index_copy_(1, places, new)
        return
    found = quantize_rows_reference(new)
    rows.values.view(torch.uint8).index_copy_(1, places, found.values.view(torch.uint8))
    rows.scale.index_copy_(1, places, found.scale)
