"""Pillow's resize of 8-bit RGB, in its fixed-point arithmetic, on any device.

Coefficients are those of Pillow's `Resample.c`: a filter (bicubic with a = -0.5, bilinear, Lanczos
of three lobes) stretched by the shrink factor, normalised in float64, rounded to 22 fractional
bits; sums in integers, clipped to 8 bits after the horizontal and after the vertical pass. Which
pass comes first is the installed Pillow's choice, so that a GPU gives the pixels that decoding
processes give on CPU devices. Knows no model.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
from torch import Tensor

from pipeline.kernels.backend import tl, triton, use_triton

PRECISION_BITS = 32 - 8 - 2
PILLOW = int(PIL.__version__.partition(".")[0])


def _bicubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3.0, _sinc(x) * _sinc(x / 3.0), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    # NOTE: math.sin is C's, as Pillow's; numpy's vector sine differs in the last bit.
    turned = x * math.pi
    sine = np.array([math.sin(t) for t in turned.ravel()]).reshape(x.shape)
    return np.where(x == 0.0, 1.0, sine / np.where(x == 0.0, 1.0, turned))


_FILTERS = {"bicubic": (_bicubic, 2.0), "bilinear": (_bilinear, 1.0), "lanczos": (_lanczos, 3.0)}


@lru_cache(maxsize=4096)
def coefficients(
    size_in: int, size_out: int, filter: str = "bicubic"
) -> tuple[np.ndarray, np.ndarray]:
    """First source pixel [size_out] and integer weights [size_out, taps] of one axis."""
    curve, radius = _FILTERS[filter]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = radius * stretch
    taps = int(np.ceil(support)) * 2 + 1
    center = (np.arange(size_out) + 0.5) * scale
    # NOTE: int() truncates toward zero in C as here; both ends are clamped afterwards.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), size_in)
    place = first[:, None] + np.arange(taps)
    x = np.abs((place - center[:, None] + 0.5) * (1.0 / stretch))
    weight = np.where(place < last[:, None], curve(x), 0.0)
    weight /= weight.sum(1, keepdims=True)
    fixed = np.trunc(weight * (1 << PRECISION_BITS) + np.copysign(0.5, weight)).astype(np.int64)
    return first, fixed


@lru_cache(maxsize=512)
def _axis(size_in: int, size_out: int, filter: str, device: torch.device) -> tuple[Tensor, Tensor]:
    first, fixed = coefficients(size_in, size_out, filter)
    index = np.minimum(first[:, None] + np.arange(fixed.shape[1]), size_in - 1)
    return torch.from_numpy(index.astype(np.int32)).to(device), torch.from_numpy(
        fixed.astype(np.int32)
    ).to(device)


def resize(image: Tensor, height: int, width: int, filter: str = "bicubic") -> Tensor:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], equal to Pillow's `resize` by that filter."""
    for axis in pass_order((image.shape[0], image.shape[1]), (height, width)):
        size = width if axis else height
        if image.shape[axis] != size:
            image = _pass(image, size, axis, filter)
    return image


def pass_order(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The axes in the order of Pillow's passes; sizes are (height, width)."""
    return (0, 1) if _rows_first(source[0] - target[0], source[1] - target[1]) else (1, 0)


def _rows_first(height_lost: int, width_lost: int) -> bool:
    """Whether the vertical pass comes first, as in Pillow since 13; the order changes roundings."""
    return PILLOW >= 13 and height_lost > 0 and height_lost > 2 * width_lost


def _pass(image: Tensor, size_out: int, axis: int, filter: str) -> Tensor:
    index, weight = _axis(image.shape[axis], size_out, filter, image.device)
    if use_triton(image):
        return _resize_axis_triton(image.contiguous(), index, weight, axis)
    return resize_axis_reference(image, index, weight, axis)


def resize_axis_beyond(
    image: Tensor, axis: int, span: tuple[int, int], size_out: int, fill: Tensor, filter: str
) -> Tensor:
    """One pass over `span` (start, size) of an axis, which may reach beyond the image.

    What lies there has the colour `fill` [3]; equal to a pass over an image so enlarged, which is
    never made.
    """
    length = image.shape[axis]
    index, weight, first, last = _axis_beyond(length, *span, size_out, filter, image.device)
    shape, edge = list(image.shape), list(image.shape)
    shape[axis], edge[axis] = size_out, 1
    out = fill.expand(shape).contiguous()
    if first == last:
        return out
    border = fill.expand(edge)
    bordered = torch.cat([border, image, border], axis)
    one_pass = _resize_axis_triton if use_triton(image) else resize_axis_reference
    out.narrow(axis, first, last - first).copy_(one_pass(bordered, index, weight, axis))
    return out


@lru_cache(maxsize=512)
def _axis_beyond(
    length: int, start: int, size_in: int, size_out: int, filter: str, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """Places in the image with an edge pixel on both sides, and which outputs see the image."""
    first, fixed = coefficients(size_in, size_out, filter)
    place = np.minimum(first[:, None] + np.arange(fixed.shape[1]), size_in - 1) + start
    seen = np.flatnonzero(((place >= 0) & (place < length) & (fixed != 0)).any(1))
    low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    index = np.clip(place[low:high] + 1, 0, length + 1).astype(np.int32)
    weight = np.ascontiguousarray(fixed[low:high].astype(np.int32))
    return torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device), low, high


def resize_axis_reference(image: Tensor, index: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One pass along `axis` (0 rows, 1 columns) with `index`, `weight` [out, taps]."""
    shape = list(image.shape)
    shape[axis] = len(index)
    total = torch.full(shape, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=image.device)
    spread = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    for tap in range(index.shape[1]):
        total += image.index_select(axis, index[:, tap]).int() * weight[:, tap].view(spread)
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


@triton.jit
def _resize_axis_kernel(
    in_ptr, index_ptr, weight_ptr, out_ptr, count, taps, inner, size_in, size_out, rounding,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Source [outer, size_in, inner] -> [outer, size_out, inner]."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    lane = element % inner
    place = (element // inner) % size_out
    outer = element // (inner * size_out)
    total = tl.zeros([BLOCK], tl.int32) + rounding
    for tap in range(taps):
        source = tl.load(index_ptr + place * taps + tap, mask=inside, other=0)
        weight = tl.load(weight_ptr + place * taps + tap, mask=inside, other=0)
        offset = (outer * size_in + source) * inner + lane
        total += tl.load(in_ptr + offset, mask=inside, other=0).to(tl.int32) * weight
    value = tl.minimum(tl.maximum(total >> SHIFT, 0), 255)
    tl.store(out_ptr + element, value.to(tl.uint8), mask=inside)


def _resize_axis_triton(image: Tensor, index: Tensor, weight: Tensor, axis: int) -> Tensor:
    shape = list(image.shape)
    size_in, inner = shape[axis], (shape[1] * shape[2] if axis == 0 else shape[2])
    shape[axis] = len(index)
    out = torch.empty(shape, dtype=torch.uint8, device=image.device)
    _resize_axis_kernel[(triton.cdiv(out.numel(), 1024),)](
        image, index, weight, out, out.numel(), index.shape[1], inner, size_in, len(index),
        1 << (PRECISION_BITS - 1), SHIFT=PRECISION_BITS, BLOCK=1024,
    )  # fmt: skip
    return out
