"""Whether a model's weights fit the device, asked before one of them is fetched or read.

Counts what the family's sizes say; what a cache and activations need beside it is `memory`'s.
"""

from __future__ import annotations

import os

import torch

from pipeline.engine.memory import device_bytes, free_bytes
from pipeline.errors import UserError
from pipeline.models.family import ModelSizes
from pipeline.settings import LabelSettings


def check_weights_fit(
    sizes: ModelSizes, settings: LabelSettings, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises: UserError that says what is needed, what is there, and what helps."""
    model = settings.model
    float8 = model.quantization == "fp8"
    needed = sizes.num_bytes(dtype.itemsize, float8)
    total, free = _room(device, settings)
    if needed <= max(0, free):
        return
    there = f"{device} has {total / 1e9:.1f} GB"
    if free < total:
        there += f", of which the model may take {max(0, free) / 1e9:.1f}"
    raise UserError(
        f"model.id {model.id!r}: the weights need {needed / 1e9:.1f} GB and {there}; "
        + _advice(sizes, None if float8 else dtype, free, device)
    )


def _room(device: torch.device, settings: LabelSettings) -> tuple[int, int]:
    """Bytes that the device has, and those that weights may take."""
    if device.type == "cuda":
        return device_bytes(device, settings.engine)[1], free_bytes(device, settings.engine)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.engine.memory_limit_gb is not None:
        total = min(total, int(settings.engine.memory_limit_gb * 1e9))
    return total, total


def _advice(sizes: ModelSizes, dtype: torch.dtype | None, free: int, device: torch.device) -> str:
    """`dtype` is that of weights that fp8 could make smaller."""
    larger = "a larger GPU" if device.type == "cuda" else "a GPU that is large enough"
    if dtype is None:
        return f"take {larger} or a smaller model"
    smaller = sizes.num_bytes(dtype.itemsize, float8=True)
    fp8 = f"`model.quantization: fp8` needs {smaller / 1e9:.1f} GB"
    return f"{fp8}: write that, or take {larger}" if smaller <= free else f"{fp8}: take {larger}"
