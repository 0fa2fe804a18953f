"""What this device reaches at a model's own shapes: matrix products, attention, copies.

A stage's ceiling is not the datasheet's number but what a library product of the stage's own
matrices reaches here and now. Knows shapes, no engine and no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from scripts.bench.limits import Peaks, Shapes, Work, cpu_seconds, cuda_seconds

TILE = 64  # the image tower's MLP is rounded up to it, as an engine may store it
ATTENTION_TOKENS = 1024
VISION_PATCHES = 4004  # of a photograph of 1024 x 768


@dataclass(frozen=True)
class Ceilings:
    """Operations a second by stage, and bytes a second of a copy."""

    vision: float
    vision_attention: float
    prefill: float
    prefill_attention: float
    bytes_per_s: float

    def seconds(self, work: Work, weight_bytes: float, num_steps: float) -> dict[str, float]:
        """The least time of each stage: the work at its ceiling.

        A step's products read the weights while they compute; its attention comes in between them,
        and reads keys and values.
        """
        vision = (work.vision - work.vision_attention) / self.vision
        prefill = (work.prefill - work.prefill_attention) / self.prefill
        linear = (work.decode - work.decode_attention) / self.prefill
        attention = work.decode_attention / self.prefill
        return {
            "vision": vision + work.vision_attention / self.vision_attention,
            "prefill": prefill + work.prefill_attention / self.prefill_attention,
            "decode": max(weight_bytes * num_steps / self.bytes_per_s, linear)
            + max(work.decode_bytes / self.bytes_per_s, attention),
        }


def measure(shapes: Shapes, device: str, peaks: Peaks, quantization: str = "none") -> Ceilings:
    """Measure them; about two seconds on a GPU."""
    on_gpu = device.startswith("cuda")
    rows = 16384 if on_gpu else 512
    bench = _Bench(device, cuda_seconds if on_gpu else cpu_seconds)
    scaled = quantization == "fp8" and on_gpu
    found = Ceilings(
        vision=bench.products(rows, _vision_maps(shapes), scaled),
        vision_attention=bench.attention(
            (1, shapes.vision_heads, VISION_PATCHES if on_gpu else 256, shapes.vision_head_dim),
            causal=False,
        ),
        prefill=bench.products(rows, _decoder_maps(shapes), scaled),
        prefill_attention=bench.attention(
            (rows // ATTENTION_TOKENS or 1, shapes.heads, min(rows, 1024), shapes.head_dim),
            causal=True,
        ),
        bytes_per_s=peaks.bytes_per_s,
    )
    bench.close()
    return found


def _vision_maps(shapes: Shapes) -> list[tuple[int, int]]:
    """(inputs, outputs) of one block's maps."""
    hidden = shapes.vision_hidden
    inner = -(-shapes.vision_intermediate // TILE) * TILE
    gates = shapes.vision_gates - 1
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, gates * inner), (inner, hidden)]


def _decoder_maps(shapes: Shapes) -> list[tuple[int, int]]:
    hidden, inner, heads = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim
    qkv = heads + 2 * shapes.kv_heads * shapes.head_dim
    return [(hidden, qkv), (heads, hidden), (hidden, 2 * inner), (inner, hidden)]


class _Bench:
    """Times library calls on random numbers."""

    def __init__(self, device: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.seconds = seconds
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def products(self, rows: int, maps: Iterable[tuple[int, int]], scaled: bool = False) -> float:
        """Operations a second over one product of each map."""
        flops = took = 0.0
        for inputs, outputs in maps:
            call = self._scaled(rows, inputs, outputs) if scaled else self._plain(
                rows, inputs, outputs
            )  # fmt: skip
            took += self.seconds(call)
            flops += 2.0 * rows * inputs * outputs
        return flops / took

    def _plain(self, rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
        x, weight = self._random(rows, inputs), self._random(outputs, inputs)
        return lambda: self.torch.nn.functional.linear(x, weight)

    def _scaled(self, rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
        torch = self.torch
        x, weight = (self._random(n, inputs).to(torch.float8_e4m3fn) for n in (rows, outputs))
        scales = torch.ones(rows, 1, device=self.device)
        other = torch.ones(1, outputs, device=self.device)
        return lambda: torch._scaled_mm(
            x, weight.t(), scales, other, out_dtype=self.dtype, use_fast_accum=True
        )

    def attention(self, shape: tuple[int, int, int, int], causal: bool) -> float:
        """Operations a second of the library's attention; a causal one does half the pairs."""
        query, key, value = (self._random(*shape) for _ in "qkv")
        attend = self.torch.nn.functional.scaled_dot_product_attention
        batch, heads, tokens, width = shape
        pairs = tokens * (tokens + 1) / 2 if causal else tokens * tokens
        took = self.seconds(lambda: attend(query, key, value, is_causal=causal))
        return 4.0 * batch * heads * width * pairs / took

    def _random(self, *shape: int) -> Any:
        return self.torch.randn(shape, device=self.device, dtype=self.dtype)

    def close(self) -> None:
        if self.device.startswith("cuda"):
            self.torch.cuda.empty_cache()
