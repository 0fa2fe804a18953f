"""Small tables from the host to the device, without either waiting for the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host; through pinned memory on CUDA."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array of the host."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)
