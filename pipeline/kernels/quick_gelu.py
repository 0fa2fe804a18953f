"""The sigmoid approximation of GELU, `x * sigmoid(1.702 x)`, in one pass.

Rounds after each of the three operations, as the plain torch expression does. Source: Hendrycks and
Gimpel, "Gaussian Error Linear Units" (2016), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.backend import tl, triton, use_triton

BLOCK = 2048


def quick_gelu(x: Tensor) -> Tensor:
    """Elementwise on a tensor of any shape."""
    if use_triton(x) and x.is_contiguous():
        return _quick_gelu_triton(x)
    return quick_gelu_reference(x)


def quick_gelu_reference(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@triton.jit
def _quick_gelu_kernel(in_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(in_ptr + index, mask=inside, other=0.0)
    kind = out_ptr.dtype.element_ty
    scaled = (x.to(tl.float32) * 1.702).to(kind).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-scaled))).to(kind).to(tl.float32)
    tl.store(out_ptr + index, (x.to(tl.float32) * gate).to(kind), mask=inside)


def _quick_gelu_triton(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        _quick_gelu_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out
