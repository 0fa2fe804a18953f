"""Images to normalised patches in the order of the Qwen processors.

Patches stand in merge groups (rows of `merge` x `merge` blocks); a patch's values are ordered
channel, frame, row, column, and a still image is repeated over the `temporal` frames. Knows no
resize. Source: transformers' Qwen2VLImageProcessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.kernels.backend import next_power_of_2, tl, triton, use_triton


def patchify(
    images: Sequence[Tensor],
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """uint8 images [h, w, 3], sides multiples of patch * merge -> [N, 3 * temporal * patch²].

    Arithmetic is the processor's in float32: `x * (1/255)`, minus the mean, over the deviation.
    """
    device = images[0].device
    mean_row, std_row = _constant(tuple(mean), device), _constant(tuple(std), device)
    if use_triton(images[0]):
        return _patchify_triton(images, patch, merge, temporal, mean_row, std_row, dtype)
    return patchify_reference(images, patch, merge, temporal, mean_row, std_row, dtype)


def patchify_reference(
    images: Sequence[Tensor],
    patch: int,
    merge: int,
    temporal: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    blocks = torch.cat([_order(image, patch, merge) for image in images])  # [N, p, p, 3]
    pixels = (blocks.float() * (1.0 / 255.0) - mean) / std
    pixels = pixels.to(dtype).permute(0, 3, 1, 2)[:, :, None]
    return pixels.expand(-1, -1, temporal, -1, -1).reshape(len(blocks), -1)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # NOTE: made once; a copy from the host at each call would wait for the device.
    return torch.tensor(values, dtype=torch.float32).to(device)


def _order(image: Tensor, patch: int, merge: int) -> Tensor:
    rows, columns = image.shape[0] // (patch * merge), image.shape[1] // (patch * merge)
    blocks = image.view(rows, merge, patch, columns, merge, patch, 3)
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch, patch, 3)


@triton.jit
def _patchify_kernel(
    image_ptr, out_ptr, mean_ptr, std_ptr, width, units_across,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TEMPORAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a patch: its rows of pixels, each channel, each frame."""
    number = tl.program_id(0)
    unit, place = number // (MERGE * MERGE), number % (MERGE * MERGE)
    top = ((unit // units_across) * MERGE + place // MERGE) * PATCH
    left = ((unit % units_across) * MERGE + place % MERGE) * PATCH
    cell = tl.arange(0, BLOCK)
    inside = cell < PATCH * PATCH
    pixel = (top + cell // PATCH).to(tl.int64) * width + left + cell % PATCH
    out = out_ptr + number.to(tl.int64) * (3 * TEMPORAL * PATCH * PATCH) + cell
    for channel in tl.static_range(3):
        value = tl.load(image_ptr + pixel * 3 + channel, mask=inside, other=0).to(tl.float32)
        value = value * (1.0 / 255.0) - tl.load(mean_ptr + channel)
        value = tl.div_rn(value, tl.load(std_ptr + channel)).to(out_ptr.dtype.element_ty)
        for frame in tl.static_range(TEMPORAL):
            place_of = (channel * TEMPORAL + frame) * PATCH * PATCH
            tl.store(out + place_of, value, mask=inside)


def _patchify_triton(
    images: Sequence[Tensor],
    patch: int,
    merge: int,
    temporal: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    counts = [i.shape[0] * i.shape[1] // patch**2 for i in images]
    values = 3 * temporal * patch**2
    out = torch.empty(sum(counts), values, dtype=dtype, device=images[0].device)
    start = 0
    for image, count in zip(images, counts, strict=True):
        _patchify_kernel[(count,)](
            image.contiguous(), out[start:], mean, std, image.shape[1],
            image.shape[1] // (patch * merge), PATCH=patch, MERGE=merge, TEMPORAL=temporal,
            BLOCK=next_power_of_2(patch * patch), num_warps=4,
        )  # fmt: skip
        start += count
    return out
