"""Images to normalised patches in the order of the Qwen processors.

Patches stand in merge groups (rows of `merge` x `merge` blocks); a patch's values are ordered
channel, frame, row, column, and a still image is repeated over the `temporal` frames, as is a
video's last frame where one is missing. Knows no resize. Source: transformers'
Qwen2VLImageProcessor and Qwen2VLVideoProcessor.
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

    Videos are [frames, h, w, 3]; their temporal patches follow one another. Arithmetic is the
    processor's in float32: `x * (1/255)`, minus the mean, over the deviation.
    """
    device = images[0].device
    images = [_whole(image, temporal) for image in images]
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
    length = temporal if any(image.dim() == 4 for image in images) else 1
    blocks = torch.cat([_order(image, patch, merge, length) for image in images])
    pixels = (blocks.float() * (1.0 / 255.0) - mean) / std  # [N, length, p, p, 3]
    pixels = pixels.to(dtype).permute(0, 4, 1, 2, 3)
    return pixels.expand(-1, -1, temporal, -1, -1).reshape(len(blocks), -1)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # NOTE: made once; a copy from the host at each call would wait for the device.
    return torch.tensor(values, dtype=torch.float32).to(device)


def _whole(image: Tensor, temporal: int) -> Tensor:
    """The image, or the video with whole temporal patches."""
    if image.dim() == 3 or not (missing := -len(image) % temporal):
        return image
    return torch.cat([image, image[-1:].expand(missing, -1, -1, -1)])


def _order(image: Tensor, patch: int, merge: int, length: int) -> Tensor:
    if image.dim() == 3:
        image = image.expand(length, -1, -1, -1)
    rows, columns = image.shape[1] // (patch * merge), image.shape[2] // (patch * merge)
    blocks = image.reshape(-1, length, rows, merge, patch, columns, merge, patch, 3)
    ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7, 8)
    return ordered.reshape(-1, length, patch, patch, 3)


@triton.jit
def _patchify_kernel(
    image_ptr, out_ptr, mean_ptr, std_ptr, width, units_across, patches_a_frame, frame_size,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TEMPORAL: tl.constexpr, BLOCK: tl.constexpr,
    MOVING: tl.constexpr,
):  # fmt: skip
    """One program a patch: its rows of pixels, each channel, each frame."""
    number = tl.program_id(0)
    out_ptr += number.to(tl.int64) * (3 * TEMPORAL * PATCH * PATCH)
    if MOVING:
        image_ptr += (number // patches_a_frame).to(tl.int64) * TEMPORAL * frame_size
        number = number % patches_a_frame
    unit, place = number // (MERGE * MERGE), number % (MERGE * MERGE)
    top = ((unit // units_across) * MERGE + place // MERGE) * PATCH
    left = ((unit % units_across) * MERGE + place % MERGE) * PATCH
    cell = tl.arange(0, BLOCK)
    inside = cell < PATCH * PATCH
    pixel = (top + cell // PATCH).to(tl.int64) * width + left + cell % PATCH
    for channel in tl.static_range(3):
        mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
        at = image_ptr + pixel * 3 + channel
        value = tl.load(at, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0) - mean
        value = tl.div_rn(value, std).to(out_ptr.dtype.element_ty)
        for frame in tl.static_range(TEMPORAL):
            if MOVING and frame > 0:
                at += frame_size
                value = tl.load(at, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0) - mean
                value = tl.div_rn(value, std).to(out_ptr.dtype.element_ty)
            place_of = (channel * TEMPORAL + frame) * PATCH * PATCH
            tl.store(out_ptr + place_of + cell, value, mask=inside)


def _num_patches(image: Tensor, patch: int, temporal: int) -> int:
    moments = len(image) // temporal if image.dim() == 4 else 1
    return moments * image.shape[-3] * image.shape[-2] // patch**2


def _patchify_triton(
    images: Sequence[Tensor],
    patch: int,
    merge: int,
    temporal: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    counts = [_num_patches(i, patch, temporal) for i in images]
    values = 3 * temporal * patch**2
    out = torch.empty(sum(counts), values, dtype=dtype, device=images[0].device)
    start = 0
    for image, count in zip(images, counts, strict=True):
        _patchify_kernel[(count,)](
            image.contiguous(), out[start:], mean, std, image.shape[-2],
            image.shape[-2] // (patch * merge), image[..., 0].shape[-2:].numel() // patch**2,
            image.shape[-3:].numel(), PATCH=patch, MERGE=merge, TEMPORAL=temporal,
            BLOCK=next_power_of_2(patch * patch), MOVING=image.dim() == 4, num_warps=4,
        )  # fmt: skip
        start += count
    return out
