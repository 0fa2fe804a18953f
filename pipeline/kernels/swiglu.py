"""SwiGLU's elementwise half: `silu(gate) * up` from the merged projection's output; for products
in float8 also the quantisation after it. GEGLU's likewise, with the tanh form of GELU.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.fp8 import (
    FP8,
    LARGEST,
    SMALLEST_SCALE,
    Quantized,
    piece_width,
    quantize_rows_reference,
)

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] with the gate first -> [..., I]."""
    if use_triton(gate_up):
        return _gated_triton(gate_up, gelu=False)
    return swiglu_reference(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] with the gate first -> [..., I]."""
    if use_triton(gate_up):
        return _gated_triton(gate_up, gelu=True)
    return geglu_reference(gate_up)


def geglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu_fp8(gate_up: Tensor, pieces: int = 1) -> Quantized:
    """`swiglu` of [N, 2 I], its rows quantised in `pieces` as `quantize_rows` does."""
    if use_triton(gate_up):
        return _swiglu_fp8_triton(gate_up, pieces)
    return quantize_rows_reference(swiglu_reference(gate_up), pieces)


@triton.jit
def _gated_kernel(in_ptr, out_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(in_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(in_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    turn = gate
    if GELU:  # its tanh written as a sigmoid: 1.59… is 2 * sqrt(2 / pi)
        turn = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    bent = (gate / (1.0 + tl.exp(-turn))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + column, (bent * up).to(out_ptr.dtype.element_ty), mask=inside)


def _gated_triton(gate_up: Tensor, gelu: bool) -> Tensor:
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width).contiguous()
    out = torch.empty(len(rows), width, dtype=gate_up.dtype, device=gate_up.device)
    if len(rows):
        grid = (len(rows), triton.cdiv(width, BLOCK))
        _gated_kernel[grid](rows, out, width, GELU=gelu, BLOCK=BLOCK)
    return out.view(*gate_up.shape[:-1], width)


@triton.jit
def _gated(base, width, column, inside, kind: tl.constexpr):
    """`silu(gate) * up` of some columns of a row, rounded as `swiglu` rounds."""
    gate = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + width + column, mask=inside, other=0.0).to(tl.float32)
    return ((gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up).to(kind).to(tl.float32)


@triton.jit
def _swiglu_fp8_kernel(
    in_ptr, out_ptr, scale_ptr, width, piece, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A piece of a row in two powers of two of columns, which waste less than one."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * piece
    end = tl.minimum(start + piece, width)
    base = in_ptr + row * 2 * width
    kind = in_ptr.dtype.element_ty
    main = start + tl.arange(0, MAIN)
    rest = start + MAIN + tl.arange(0, REST)
    low = _gated(base, width, main, main < end, kind)
    high = _gated(base, width, rest, rest < end, kind)
    peak = tl.maximum(tl.max(tl.abs(low), 0), tl.max(tl.abs(high), 0))
    unit = tl.maximum(peak / LARGEST, SMALLEST)
    inverse = 1.0 / unit
    tl.store(scale_ptr + row * tl.num_programs(1) + tl.program_id(1), unit)
    out = out_ptr + row * width
    tl.store(out + main, (low * inverse).to(tl.float8e4nv), mask=main < end)
    tl.store(out + rest, (high * inverse).to(tl.float8e4nv), mask=rest < end)


def _swiglu_fp8_triton(gate_up: Tensor, pieces: int) -> Quantized:
    rows, width = len(gate_up), gate_up.shape[1] // 2
    values = torch.empty(rows, width, dtype=FP8, device=gate_up.device)
    scale = torch.empty(rows, pieces, dtype=torch.float32, device=gate_up.device)
    piece = piece_width(width, pieces)
    main = 1 << (piece.bit_length() - 1)
    if rows:
        _swiglu_fp8_kernel[(rows, pieces)](
            gate_up.contiguous(), values, scale, width, piece, LARGEST=LARGEST,
            SMALLEST=SMALLEST_SCALE, MAIN=main, REST=max(16, next_power_of_2(piece - main)),
            num_warps=min(16, max(4, main // 1024)),
        )  # fmt: skip
    return Quantized(values, scale)
