"""Which implementation runs: Triton for CUDA tensors, the torch reference elsewhere.

`VLM_BATCH_KERNELS=reference` or `=triton` overrides the choice; with `TRITON_INTERPRET=1` the
latter runs the kernels on CPU tensors, which is how CI tests them. Knows no kernel.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton wheel for this platform: the references still work

    class _Missing:
        def jit(self, function: Any = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            raise ImportError("Triton is not installed")

    triton = _Missing()
    tl = None

__all__ = [
    "invariant", "next_power_of_2", "set_invariant", "shared_memory", "tl", "triton", "use_triton",
]  # fmt: skip

_invariant = False


def set_invariant(on: bool) -> None:
    """Whether products and attention must give a row the same bits in every batch."""
    global _invariant
    _invariant = on


def invariant() -> bool:
    return _invariant


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel should run for `tensor`."""
    choice = os.environ.get("VLM_BATCH_KERNELS", "auto")
    if choice == "reference":
        return False
    return choice == "triton" or (tensor.is_cuda and tl is not None)


@lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of fast memory that one block of a kernel may use."""
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
