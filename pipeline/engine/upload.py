"""Decoded images to the device, beside the computation: a copy stream from pinned memory.

Knows bytes and streams only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RowError


@dataclass(slots=True)
class Uploaded:
    """One fed item's images on the device (or their errors), ready after `event`."""

    images: tuple[Tensor | RowError, ...]
    event: Any = None

    @property
    def num_bytes(self) -> int:
        return sum(i.nbytes for i in self.images if isinstance(i, Tensor))

    def wait(self) -> None:
        """Make the current stream wait for the copies."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
            for image in self.images:
                if isinstance(image, Tensor):
                    image.record_stream(torch.cuda.current_stream())


class Uploader:
    """Copies uint8 images [H, W, 3]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, images: Sequence[np.ndarray | RowError]) -> Uploaded:
        """Start the copies. The arrays may be given back as soon as this returns."""
        if self.stream is None:
            # NOTE: a copy, because the shared memory behind the arrays is given back.
            copied = [i if isinstance(i, RowError) else torch.tensor(i) for i in images]
            return Uploaded(tuple(copied))
        found: list[Tensor | RowError] = []
        with torch.cuda.stream(self.stream):
            for image in images:
                if isinstance(image, RowError):
                    found.append(image)
                    continue
                pinned = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True)
                pinned.numpy()[...] = image
                found.append(pinned.to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self.stream)
        return Uploaded(tuple(found), event)
