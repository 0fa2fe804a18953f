"""A matrix product of which a row never depends on the other rows, nor on how many there are.

Libraries choose kernels, tiles and splits by the shape, so the last bits of a row change with its
batch. Here every shape takes the same tile and adds along K in the same order. Slower than the
library; `engine.deterministic` pays for it. Knows no layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import tl, triton, use_triton

BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 128, 64, 8
REFERENCE_ROWS = 32


def invariant_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> Tensor:
    """`a` [N, K] and `b` [M, K] -> `a @ b.T + bias` [N, M] in `dtype`.

    Float8 operands have scales [N, 1] and [M, 1].
    """
    if use_triton(a):
        return _matmul_triton(a, b, bias, dtype, a_scale, b_scale)
    return invariant_matmul_reference(a, b, bias, dtype, a_scale, b_scale)


def invariant_matmul_reference(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> Tensor:
    """Rows in blocks of one size, so that the library takes one path for all of them."""
    if a_scale is not None and b_scale is not None:
        a, b = a.float() * a_scale, b.float() * b_scale
    rows = len(a)
    blocks = functional.pad(a, (0, 0, 0, -rows % REFERENCE_ROWS)).split(REFERENCE_ROWS)
    bias = bias.to(a.dtype) if bias is not None else None
    done = [functional.linear(block, b.to(a.dtype), bias) for block in blocks]
    return torch.cat(done)[:rows].to(dtype) if done else a.new_empty(0, len(b), dtype=dtype)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, bias_ptr, a_scale_ptr, b_scale_ptr, out_ptr, rows, columns, depth, a_stride,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles are taken in groups of rows, so that neighbours share operands in the cache.
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tl.program_id(0) % (GROUP_M * tiles_n) % group_size
    tile_n = tl.program_id(0) % (GROUP_M * tiles_n) // group_size
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + (m % rows).to(tl.int64)[:, None] * a_stride + k[None, :]
    b = b_ptr + (n % columns).to(tl.int64)[None, :] * depth + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        left = tl.load(a, mask=inside[None, :], other=0.0)
        right = tl.load(b, mask=inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    if HAS_SCALE:
        acc *= (
            tl.load(a_scale_ptr + m % rows)[:, None] * tl.load(b_scale_ptr + n % columns)[None, :]
        )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n % columns).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _matmul_triton(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
) -> Tensor:
    if a.stride(1) != 1:
        a = a.contiguous()
    (rows, depth), columns = a.shape, len(b)
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    tiles = triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N)
    if tiles:
        _matmul_kernel[(tiles,)](
            a, b, bias, a_scale, b_scale, out, rows, columns, depth, a.stride(0),
            HAS_BIAS=bias is not None, HAS_SCALE=a_scale is not None,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return out
