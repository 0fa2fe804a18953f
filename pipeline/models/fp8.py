"""A decoder's linear maps in eight-bit floating point, quantised when the model is loaded.

Weights have one scale an output row, inputs one a token, so a row's result does not depend on its
neighbours. Embedding, head, norms and the image tower stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.fp8 import quantize_rows, scaled_product
from pipeline.models.decoder import Decoder
from pipeline.models.layers import Linear

MULTIPLE = 16  # of both sides, for the device's product


class Fp8Linear(Linear):
    """`x @ weight.T + bias` with a float8 weight and inputs rounded to float8 on the way."""

    __slots__ = ("scale",)

    def __init__(self, linear: Linear) -> None:
        weight, self.scale = quantize_rows(linear.weight)
        super().__init__(weight, linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        quantized, scale = quantize_rows(x)
        return scaled_product(quantized, scale, self.weight, self.scale, self.bias, x.dtype)


def _fits(linear: Linear) -> bool:
    return all(size % MULTIPLE == 0 for size in linear.weight.shape)


def quantize_decoder(decoder: Decoder) -> None:
    """Replace the linear maps of all layers.

    Raises: UserError where the device cannot multiply float8.
    """
    device = decoder.head.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            "model.quantization fp8 needs a GPU of compute capability 8.9 or newer; "
            "write `quantization: none`."
        )
    for layer in decoder.layers:
        for part, name in (
            (layer, "qkv"),
            (layer, "out"),
            (layer.mlp, "gate_up"),
            (layer.mlp, "down"),
        ):
            linear = getattr(part, name)
            if _fits(linear):
                setattr(part, name, Fp8Linear(linear))
