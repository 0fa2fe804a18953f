"""A model's linear maps in eight-bit floating point, each quantised when it is loaded.

Weights have one scale an output row, inputs one a token, so a row's result does not depend on its
neighbours. Norms and gates before such a map quantise in the same pass. For a few rows, what goes
to a norm alone may come in parts, which the norm adds. Embedding, head, mergers and projectors stay
as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.fp8 import Quantized, quantize_rows, scaled_product
from pipeline.kernels.rms_norm import rms_norm_fp8
from pipeline.kernels.split_matmul import Parts, plan_for, split_matmul
from pipeline.kernels.swiglu import swiglu_fp8
from pipeline.models.layers import GatedMLP, Linear, RMSNorm

MULTIPLE = 16  # of both sides, for the device's product


class Fp8Linear(Linear):
    """`x @ weight.T + bias` with a float8 weight and inputs rounded to float8 on the way.

    With `parts`, few rows come as `Parts`: a norm must read them.
    """

    __slots__ = ("dtype", "parts", "scale")

    def __init__(self, linear: Linear, parts: bool = False) -> None:
        weight, self.scale = quantize_rows(linear.weight)
        self.dtype = linear.weight.dtype
        self.parts = parts
        super().__init__(weight, linear.bias)

    def pieces(self, rows: int) -> int:
        """Scales that a row of the input has, when there are `rows`."""
        plan = plan_for(rows, self.weight, self.parts)
        return plan.pieces if plan is not None else 1

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        if not isinstance(x, Quantized):
            x = quantize_rows(x, self.pieces(len(x)))
        plan = plan_for(len(x.values), self.weight, self.parts)
        product = scaled_product if plan is None else partial(split_matmul, plan)
        return cast(Tensor, product(*x, self.weight, self.scale, self.bias, self.dtype))


class Fp8RMSNorm(RMSNorm):
    """The norm before an `Fp8Linear` and nothing else: its rows come out quantised."""

    __slots__ = ()

    def __call__(self, x: Tensor | Parts, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed, total = rms_norm_fp8(x, self.weight, self.eps, residual)
        return cast(Tensor, normed), total


class Fp8GatedMLP(GatedMLP):
    """A gated MLP of two `Fp8Linear`."""

    __slots__ = ()
    down: Fp8Linear

    def __call__(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(swiglu_fp8(both, self.down.pieces(len(both))))


def check_device(
    device: torch.device, setting: str = "model.quantization", other: str = "none"
) -> None:
    """Raises: UserError where the device has no float8; `other` is what to write then."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{setting} fp8 needs a GPU of compute capability 8.9 or newer; "
            f"write `{setting.rpartition('.')[2]}: {other}`."
        )


def quantize_block(block: Any, norms: dict[str, str], parts: Collection[str] = ()) -> None:
    """Replace a layer's linear maps, those of its MLP too.

    `norms` names the norm whose rows go to a map alone: {"qkv": "attention_norm", …}; "mlp" stands
    for the gated MLP's first map. `parts` names the maps whose results go to a norm alone; "mlp"
    stands for the gated MLP's last one.
    """
    for name in ("qkv", "out", "mlp"):
        quantize = getattr(getattr(block, name, None), "quantize", None)
        if quantize is not None:  # latent attention, a mixture of experts
            quantize()
    for name in ("qkv", "out", "proj", "joined", "q_up"):
        linear = getattr(block, name, None)
        if type(linear) is Linear and _fits(linear):
            setattr(block, name, Fp8Linear(linear, name in parts))
            _fuse(block, norms.get(name))
    mlp = getattr(block, "mlp", None)
    if type(mlp) is not GatedMLP or not (_fits(mlp.gate_up) and _fits(mlp.down)):
        return
    kind = Fp8GatedMLP if mlp.act == "silu" else GatedMLP
    block.mlp = kind(Fp8Linear(mlp.gate_up), Fp8Linear(mlp.down, "mlp" in parts), mlp.act)
    _fuse(block, norms.get("mlp"))


def _fuse(block: Any, name: str | None) -> None:
    norm = getattr(block, name) if name else None
    if name and type(norm) is RMSNorm:
        setattr(block, name, Fp8RMSNorm(norm.weight, norm.eps))


def _fits(linear: Linear) -> bool:
    return all(size % MULTIPLE == 0 for size in linear.weight.shape)
