"""SwiGLU's elementwise half: `silu(gate) * up` from the merged projection's output; for products
in float8 also the quantisation after it.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton
from pipeline.kernels.fp8 import FP8, LARGEST, SMALLEST_SCALE, Quantized, quantize_rows_reference

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] with the gate first -> [..., I]."""
    if use_triton(gate_up):
        return _swiglu_triton(gate_up)
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu_fp8(gate_up: Tensor) -> Quantized:
    """`swiglu` of [N, 2 I], its rows quantised as `quantize_rows` does."""
    if use_triton(gate_up):
        return _swiglu_fp8_triton(gate_up)
    return quantize_rows_reference(swiglu_reference(gate_up))


@triton.jit
def _swiglu_kernel(in_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(in_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(in_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + column, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width).contiguous()
    out = torch.empty(len(rows), width, dtype=gate_up.dtype, device=gate_up.device)
    if len(rows):
        _swiglu_kernel[(len(rows), triton.cdiv(width, BLOCK))](rows, out, width, BLOCK=BLOCK)
    return out.view(*gate_up.shape[:-1], width)


@triton.jit
def _swiglu_fp8_kernel(
    in_ptr, out_ptr, scale_ptr, width,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    kind = in_ptr.dtype.element_ty
    gate = tl.load(in_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(in_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value = ((gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up).to(kind).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(value), 0) / LARGEST, SMALLEST)
    tl.store(scale_ptr + row, unit)
    tl.store(out_ptr + row * width + column, (value / unit).to(tl.float8e4nv), mask=inside)


def _swiglu_fp8_triton(gate_up: Tensor) -> Quantized:
    rows, width = len(gate_up), gate_up.shape[1] // 2
    values = torch.empty(rows, width, dtype=FP8, device=gate_up.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=gate_up.device)
    block = next_power_of_2(width)
    if rows:
        _swiglu_fp8_kernel[(rows,)](
            gate_up.contiguous(), values, scale, width, LARGEST=LARGEST,
            SMALLEST=SMALLEST_SCALE, BLOCK=block, num_warps=min(32, max(4, block // 1024)),
        )  # fmt: skip
    return Quantized(values, scale)
