"""SwiGLU's elementwise half: `silu(gate) * up` from the merged projection's output.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels.backend import tl, triton, use_triton

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] with the gate first -> [..., I]."""
    if use_triton(gate_up):
        return _swiglu_triton(gate_up)
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


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
