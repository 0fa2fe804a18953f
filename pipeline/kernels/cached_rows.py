"""Keys or values of one layer as the cache holds them: as they are, or in float8 with scales.

A float8 row is one token's key or value of one head, and has a scale of its own, so that a row does
not depend on its neighbours. Knows no layer, no place and no attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.fp8 import FP8, Quantized, quantize_rows_reference

CachedRows = Tensor | Quantized  # [Hk, N, D]; scales are [Hk, N, 1]
BLOCK = 16  # rows of a program


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
        return _select(values, index)
    picked = _select(values.view(torch.uint8), index).view(FP8)
    return (picked.float() * _select(scale, index)).to(dtype)


def _select(values: Tensor, index: Tensor) -> Tensor:
    """`values` [Hk, N, D] at `index` [n]: [Hk, n, D]."""
    # NOTE: index_select copies whole rows; indexing with a tensor takes five times as long. Along
    # another dimension than the first it runs in one thread.
    found = values.new_empty(len(values), len(index), values.shape[2])
    for head, out in zip(values, found, strict=True):
        torch.index_select(head, 0, index, out=out)
    return found


def put_rows(rows: CachedRows, places: Tensor, new: Tensor) -> None:
    """Write `new` [T, Hk, D] at `places` [T]."""
    new = new.transpose(0, 1)
    if not isinstance(rows, Quantized):
        rows.index_copy_(1, places, new)
        return
    found = quantize_rows_reference(new)
    rows.values.view(torch.uint8).index_copy_(1, places, found.values.view(torch.uint8))
    rows.scale.index_copy_(1, places, found.scale)


def plain_rows(
    k: Quantized, v: Quantized, index: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Float8 keys and values at `index` int64 [n] in plain numbers, [Hk, n, D] each.

    What many queries read is cheaper to turn once than in each tile of queries.
    """
    if not use_triton(k.values):
        return take_rows(k, index, dtype), take_rows(v, index, dtype)
    heads, rows, dim = k.values.shape
    found = torch.empty(2, heads, len(index), dim, dtype=dtype, device=index.device)
    if len(index):
        _plain_rows_kernel[(triton.cdiv(len(index), BLOCK), heads)](
            k.values, v.values, k.scale, v.scale, index, found[0], found[1], len(index), rows,
            DIM=dim, BLOCK_D=next_power_of_2(dim), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return found[0], found[1]


@triton.jit
def _plain_rows_kernel(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, index_ptr, k_out_ptr, v_out_ptr, count, num_rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)[None, :]
    known = row < count
    source = head * num_rows + tl.load(index_ptr + row, mask=known, other=0)
    target = (head * count + row)[:, None] * DIM + channel
    mask = known[:, None] & (channel < DIM)
    keys = tl.load(k_ptr + source[:, None] * DIM + channel, mask=mask, other=0.0).to(tl.float32)
    keys *= tl.load(k_scale_ptr + source, mask=known, other=0.0)[:, None]
    tl.store(k_out_ptr + target, keys.to(k_out_ptr.dtype.element_ty), mask=mask)
    values = tl.load(v_ptr + source[:, None] * DIM + channel, mask=mask, other=0.0).to(tl.float32)
    values *= tl.load(v_scale_ptr + source, mask=known, other=0.0)[:, None]
    tl.store(v_out_ptr + target, values.to(v_out_ptr.dtype.element_ty), mask=mask)
