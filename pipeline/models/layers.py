"""The small parts of which towers and decoders are made: linear maps, norms, activations.

Plain objects around tensors that need no gradient; taking them from `Weights` is a class method, so
an architecture reads as a list of tensor names. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.kernels.linear import linear
from pipeline.kernels.quick_gelu import quick_gelu
from pipeline.kernels.rms_norm import rms_norm
from pipeline.kernels.split_matmul import Parts
from pipeline.kernels.swiglu import geglu, swiglu
from pipeline.models.loading import Weights


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the activation that configs call `name`."""
    if name not in _ACTIVATIONS:
        raise UserError(f"The activation {name!r} is unknown; known: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def padded(size: int, multiple: int = 64) -> int:
    """Return `size` rounded up: the matrix units run uneven sizes at two thirds of their speed."""
    return -(-size // multiple) * multiple


@dataclass(slots=True)
class Linear:
    """`x @ weight.T + bias`, weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def take(cls, weights: Weights, name: str, out: int, into: int, bias: bool = True) -> Linear:
        weight = weights.take(f"{name}.weight", (out, into))
        return cls(weight, weights.take(f"{name}.bias", (out,)) if bias else None)

    @classmethod
    def merged(
        cls,
        weights: Weights,
        names: Sequence[str],
        outs: Sequence[int],
        into: int,
        bias: bool = True,
        pad: int = 0,
    ) -> Linear:
        """Several maps of one input as one; each part is followed by zero rows up to `pad`."""
        weight = weights.take_rows([f"{n}.weight" for n in names], outs, into, pad)
        if not bias:
            return cls(weight)
        return cls(weight, weights.take_rows([f"{n}.bias" for n in names], outs, None, pad))

    def pad_inputs(self, into: int) -> Linear:
        """Return the same map for inputs that carry further values, which it ignores."""
        extra = into - self.weight.shape[1]
        return Linear(F.pad(self.weight, (0, extra)) if extra else self.weight, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(slots=True)
class LayerNorm:
    """Mean and variance normalised, with weight and bias."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def take(cls, weights: Weights, name: str, size: int, eps: float) -> LayerNorm:
        return cls(
            weights.take(f"{name}.weight", (size,)), weights.take(f"{name}.bias", (size,)), eps
        )

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of `x` (+ `residual`), and what was normed."""
        if residual is not None:
            x = x + residual
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps), x


@dataclass(slots=True)
class RMSNorm:
    """Root mean square normalised. With an `offset` (Gemma) the weight stands for `offset + w`."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0

    @classmethod
    def take(
        cls, weights: Weights, name: str, size: int, eps: float, offset: float = 0.0
    ) -> RMSNorm:
        # NOTE: 1 + w in bfloat16 would lose the low bits of a small w.
        dtype = torch.float32 if offset else None
        weight = weights.take(f"{name}.weight", (size,), dtype)
        return cls(weight + offset if offset else weight, eps, offset)

    def __call__(
        self, x: torch.Tensor | Parts, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of `x` (+ `residual`), and what was normed."""
        return rms_norm(x, self.weight, self.eps, residual)


@dataclass(slots=True)
class GatedMLP:
    """`down(act(gate(x)) * up(x))`, gate and up as one matrix, the inner width padded."""

    gate_up: Linear
    down: Linear
    act: str = "silu"

    @classmethod
    def take(
        cls, weights: Weights, name: str, size: int, inner: int, bias: bool, act: str = "silu"
    ) -> GatedMLP:
        activation(act)
        wide = padded(inner)
        parts = [f"{name}.gate_proj", f"{name}.up_proj"]
        gate_up = Linear.merged(weights, parts, [inner, inner], size, bias, pad=wide)
        down = Linear.take(weights, f"{name}.down_proj", size, inner, bias)
        return cls(gate_up, down.pad_inputs(wide), act)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        if _ACTIVATIONS[self.act] is F.silu:
            return self.down(swiglu(both))
        if _ACTIVATIONS[self.act] is gelu_tanh:
            return self.down(geglu(both))
        gate, up = both.chunk(2, dim=-1)
        return self.down(activation(self.act)(gate) * up)


@dataclass(slots=True)
class MLP:
    """`second(act(first(x)))`."""

    first: Linear
    second: Linear
    act: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def take(
        cls, weights: Weights, names: tuple[str, str], sizes: tuple[int, int, int], act: str
    ) -> MLP:
        into, inner, out = sizes
        wide = padded(inner)
        first = Linear.merged(weights, [names[0]], [inner], into, pad=wide)
        second = Linear.take(weights, names[1], out, inner)
        return cls(first, second.pad_inputs(wide), activation(act))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))
