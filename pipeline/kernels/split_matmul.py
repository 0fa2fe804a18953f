"""The float8 product of a few rows with a weight matrix whose tiles do not fill the device.

The library gives a tile of the output to a multiprocessor. For a decode step's lanes there are
fewer tiles than multiprocessors, so most of the memory's speed lies idle. Here K is cut in pieces
until the programs fill the device; each piece of a row has a scale of its own, and the norm that
reads the product adds the parts. A row's result depends on the number of rows, not on the others.
Knows no layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.backend import invariant, tl, triton, use_triton
from pipeline.kernels.fp8 import STEP, piece_width

LIBRARY_TILE = 128  # rows and columns that the library gives to a multiprocessor
LEAST_STEPS = 4  # of a piece of K


class Tile(NamedTuple):
    """A program's part of the output, and how many such programs a multiprocessor holds."""

    block_n: int
    block_m: int
    stages: int
    warps: int
    resident: int


# By the most rows they serve: for products that may come in parts, and for those that may not.
# Chosen on an H200 (scripts/bench/LOG.md); beyond 256 rows the library is as good.
PART_TILES = {
    32: Tile(128, 32, 5, 4, 1),
    64: Tile(128, 64, 8, 4, 1),
    256: Tile(128, 64, 4, 4, 2),
}
WHOLE_TILES = {
    32: Tile(64, 32, 8, 4, 2),
    64: Tile(64, 64, 8, 4, 1),
    256: Tile(64, 64, 4, 4, 3),
}
FEWEST_ROWS = 16  # for which the library is too slow even where its tiles fill the device


class Plan(NamedTuple):
    """How a product is cut: tiles of `block_n` weights by `block_m` rows, K in `pieces`."""

    block_n: int
    block_m: int
    pieces: int
    stages: int
    warps: int


class Parts(NamedTuple):
    """A product as float32 parts [P, N, M], to be added and rounded to `dtype`."""

    values: Tensor
    dtype: torch.dtype


def plan_for(rows: int, weight: Tensor, parts: bool) -> Plan | None:
    """Return `choose_plan` for a float8 `weight` [M, K]; None where rows must not see their number.

    The kernel's tiles are Hopper's.
    """
    if invariant() or not use_triton(weight):
        return None
    return choose_plan(rows, len(weight), weight.shape[1], _processors(weight.device), parts)


def choose_plan(rows: int, columns: int, depth: int, processors: int, parts: bool) -> Plan | None:
    """Return how to cut a product, or None where the library is to compute it.

    The library's tiles must be fewer than `processors`, or the rows very few. Where the product may
    come in `parts`, there are as many as the device holds at once, of LEAST_STEPS each; where it
    comes whole, our tiles must be more than the library's.
    """
    library = -(-rows // LIBRARY_TILE) * -(-columns // LIBRARY_TILE)
    tiles = PART_TILES if parts else WHOLE_TILES
    tile = next((tile for most, tile in tiles.items() if rows <= most), None)
    if tile is None or not rows or not processors:
        return None
    if library >= processors and rows > FEWEST_ROWS:
        return None
    if depth % STEP or columns % tile.block_n:
        return None
    ours, steps = -(-rows // tile.block_m) * columns // tile.block_n, depth // STEP
    pieces = 1
    if parts:
        wanted = max(1, min(tile.resident * processors // ours, steps // LEAST_STEPS))
        pieces = -(-steps // -(-steps // wanted))  # none is empty
    if pieces == 1 and (parts or ours <= library):
        return None
    return Plan(tile.block_n, tile.block_m, pieces, tile.stages, tile.warps)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper; 0 elsewhere."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def whole(x: Tensor | Parts) -> Tensor:
    """Add the parts, where there are any."""
    return x.values.sum(0).to(x.dtype) if isinstance(x, Parts) else x


def split_matmul(
    plan: Plan,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | Parts:
    """float8 `a` [N, K], `b` [M, K] -> [N, M] in `dtype`, or in parts.

    `a_scale` is [N, P], `b_scale` [M, 1]. M and K are multiples of the plan's blocks.
    """
    (rows, depth), columns = a.shape, len(b)
    one = plan.pieces == 1
    shape = (rows, columns) if one else (plan.pieces, rows, columns)
    out = torch.empty(shape, dtype=dtype if one else torch.float32, device=a.device)
    tiles_m = triton.cdiv(rows, plan.block_m)
    each = piece_width(depth, plan.pieces) // STEP
    if rows:
        _split_kernel[(tiles_m * (columns // plan.block_n), plan.pieces)](
            _descriptor(a, plan.block_m), _descriptor(b, plan.block_n), bias, a_scale, b_scale, out,
            rows, columns, depth, each, tiles_m,
            HAS_BIAS=bias is not None,
            BLOCK_N=plan.block_n, BLOCK_M=plan.block_m, BLOCK_K=STEP,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return out if one else Parts(out, dtype)


def _descriptor(x: Tensor, block: int) -> Any:
    """Tells the device's copy engine of tiles of `block` rows; rows beyond the last read as 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [block, STEP])


# NOTE: nothing that changes with the number of rows is a constant: each would be compiled anew.
@triton.jit(do_not_specialize=["rows", "each", "tiles_m"])
def _split_kernel(
    a, b, bias_ptr, a_scale_ptr, b_scale_ptr, out_ptr, rows, columns, depth, each, tiles_m,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The weights stand on the left: they fill the matrix units, however few rows there are.
    piece = tl.program_id(1)
    top = tl.program_id(0) % tiles_m * BLOCK_M
    left = tl.program_id(0) // tiles_m * BLOCK_N
    first = piece * each
    k = first * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(tl.minimum(each, depth // BLOCK_K - first)):
        acc = tl.dot(b.load([left, k]), a.load([top, k]).T, acc)
        k += BLOCK_K
    m = top + tl.arange(0, BLOCK_M)
    n = left + tl.arange(0, BLOCK_N)
    present = m < rows
    by_row = tl.load(a_scale_ptr + m * tl.num_programs(1) + piece, mask=present, other=0.0)
    acc *= tl.load(b_scale_ptr + n)[:, None] * by_row[None, :]
    if HAS_BIAS:
        if piece == 0:
            acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    out = out_ptr + (piece * rows + m.to(tl.int64)[None, :]) * columns + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=present[None, :])
