"""What the hardware allows: the model's floating point work, and a card's measured peaks.

Counts the work that an answer needs, not what an engine happens to do: padding and repeated
work lower the share, tokens taken from a cache are not counted. Torch only inside `peaks`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.models.family import cached_bytes

if TYPE_CHECKING:
    from pipeline.models.family import ModelSizes


@dataclass(frozen=True)
class Work:
    """Floating point operations by stage, and the bytes that decoding must read."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    decode_bytes: float = 0.0  # keys and values alone
    vision_attention: float = 0.0  # of `vision`: the products of queries, keys and values
    prefill_attention: float = 0.0  # of `prefill`
    decode_attention: float = 0.0  # of `decode`

    @property
    def flops(self) -> float:
        return self.vision + self.prefill + self.decode


@dataclass(frozen=True)
class Peaks:
    """A device's measured peaks: bf16 matrix products and memory copies."""

    flops: float
    bytes_per_s: float


@dataclass(frozen=True)
class Shapes:
    """The sizes in a Qwen2-VL or Qwen2.5-VL config that its work follows from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    vision_layers: int
    vision_full_layers: int
    vision_gates: int  # matrices of its MLP: 3 with a gate, 2 without
    window: int  # patches that attend to each other in a window; 0 for none
    merge: int
    patch_values: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shapes:
        """Read the sizes of a Qwen-VL config.json; raises KeyError for other models."""
        text = {**config, **config.get("text_config", {})}
        vision = config["vision_config"]
        hidden = vision.get("embed_dim") or vision["hidden_size"]
        patch = vision["patch_size"]
        windowed = "fullatt_block_indexes" in vision
        full = len(vision["fullatt_block_indexes"]) if windowed else vision["depth"]
        heads = text["num_attention_heads"]
        return cls(
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocab=text["vocab_size"],
            vision_hidden=hidden,
            vision_intermediate=vision.get("intermediate_size") or int(hidden * 4),
            vision_heads=vision["num_heads"],
            vision_layers=vision["depth"],
            vision_full_layers=full,
            vision_gates=3 if windowed else 2,
            window=(vision.get("window_size", 0) // patch) ** 2 if windowed else 0,
            merge=vision.get("spatial_merge_size", 2),
            patch_values=3 * vision.get("temporal_patch_size", 2) * patch * patch,
        )

    @property
    def vision_head_dim(self) -> int:
        return self.vision_hidden // self.vision_heads

    @property
    def token_flops(self) -> float:
        """The decoder's matrix work for one token, without attention and the head."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = self.hidden * qkv + self.heads * self.head_dim * self.hidden
        return 2.0 * self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_flops(self) -> float:
        return 2.0 * self.hidden * self.vocab

    @property
    def pair_flops(self) -> float:
        """Attention of one query to one key over all layers: the product and the sum."""
        return 4.0 * self.layers * self.heads * self.head_dim

    def kv_bytes(self, value_bytes: int = 2, float8: bool = False) -> int:
        """Keys and values of one token; `float8` as in `engine.kv_cache`."""
        rows = 2 * self.layers * self.kv_heads
        return rows * cached_bytes(self.head_dim, value_bytes, float8)

    def vision_flops(self, num_patches: int) -> float:
        """The vision tower and the projector for one image."""
        n, h = float(num_patches), self.vision_hidden
        layer = 4 * h * h + self.vision_gates * h * self.vision_intermediate
        unit = self.merge**2
        merger = n / unit * (unit * h) * (unit * h + self.hidden)
        linear = self.vision_layers * n * layer + n * self.patch_values * h + merger
        return 2 * linear + self.vision_attention_flops(num_patches)

    def vision_attention_flops(self, num_patches: int) -> float:
        n = float(num_patches)
        windows = self.vision_layers - self.vision_full_layers
        pairs = n * n * self.vision_full_layers + n * self.window * windows
        return 4 * pairs * self.vision_hidden

    def prefill_flops(self, num_tokens: int, num_cached: int) -> float:
        """The tokens that no cache holds, each attending to all before it, and one head."""
        linear = (num_tokens - num_cached) * self.token_flops
        return linear + self.prefill_attention_flops(num_tokens, num_cached) + self.head_flops

    def prefill_attention_flops(self, num_tokens: int, num_cached: int) -> float:
        new = num_tokens - num_cached
        return (new * num_cached + new * (new + 1) / 2) * self.pair_flops

    def decode_flops(self, num_prompt: int, num_output: int) -> float:
        steps = max(0, num_output - 1)  # the first token comes out of the prefill
        linear = steps * (self.token_flops + self.head_flops)
        return linear + self.decode_attention_flops(num_prompt, num_output)

    def decode_attention_flops(self, num_prompt: int, num_output: int) -> float:
        return read_tokens(num_prompt, num_output) * self.pair_flops

    @property
    def decoder_values(self) -> float:
        """The numbers that a decode step reads of the decoder and its head."""
        return (self.token_flops + self.head_flops) / 2


def read_tokens(num_prompt: int, num_output: int) -> float:
    """Tokens whose keys and values decoding reads; the weights' share depends on the slots."""
    steps = max(0, num_output - 1)
    return steps * num_prompt + steps * (steps + 1) / 2


def work(
    shapes: Shapes,
    patches: Iterable[int],
    answers: Iterable[tuple[int, int, int]],
    value_bytes: int = 2,
    float8: bool = False,
) -> Work:
    """Sum the work over distinct images' patches and answers (prompt, cached, output).

    `value_bytes` and `float8` say how the cache holds keys and values.
    """
    rows, images = list(answers), list(patches)
    kept = shapes.kv_bytes(value_bytes, float8)
    return Work(
        vision=sum(shapes.vision_flops(n) for n in images),
        prefill=sum(shapes.prefill_flops(prompt, cached) for prompt, cached, _ in rows),
        decode=sum(shapes.decode_flops(prompt, output) for prompt, _, output in rows),
        decode_bytes=kept * sum(read_tokens(prompt, output) for prompt, _, output in rows),
        vision_attention=sum(shapes.vision_attention_flops(n) for n in images),
        prefill_attention=sum(shapes.prefill_attention_flops(p, cached) for p, cached, _ in rows),
        decode_attention=sum(shapes.decode_attention_flops(p, output) for p, _, output in rows),
    )


def work_of_sizes(
    sizes: ModelSizes,
    image_tokens: Iterable[int],
    answers: Iterable[tuple[int, int, int]],
    value_bytes: int = 2,
    float8: bool = False,
) -> Work:
    """As `work`, from what a family tells of its weights: for those without `Shapes`."""
    token = 2.0 * (sizes.active_params or sizes.decoder_params)
    kept = sizes.kv_bytes_per_token(value_bytes, float8)
    pair = 4.0 * sizes.num_layers * sizes.num_heads * sizes.head_dim
    vision = vision_attention = prefill = prefill_attention = 0.0
    decode = decode_attention = decode_bytes = 0.0
    for count in image_tokens:
        patches = count * sizes.patches_per_token
        seen = min(patches, sizes.patches_per_run or patches)
        attention = 4.0 * patches * seen * sizes.vision_width * sizes.vision_full_blocks
        vision += 2.0 * (sizes.vision_params * patches + sizes.projector_params * count)
        vision_attention += attention
    for prompt, cached, output in answers:
        new, steps = prompt - cached, max(0, output - 1)
        prefill += new * token + sizes.embedding_params
        prefill_attention += (new * cached + new * (new + 1) / 2) * pair
        pairs = read_tokens(prompt, output)
        decode += steps * (token + sizes.embedding_params)
        decode_attention += pairs * pair
        decode_bytes += kept * pairs
    return Work(
        vision + vision_attention, prefill + prefill_attention, decode + decode_attention,
        decode_bytes, vision_attention, prefill_attention, decode_attention,
    )  # fmt: skip


def peaks(device: str) -> Peaks:
    """Measure the device's matrix and copy peaks; about a second on a GPU."""
    import torch

    if not device.startswith("cuda"):
        return _measured(device, torch.float32, 1024, 1 << 26, cpu_seconds)
    found = _measured(device, torch.bfloat16, 8192, 1 << 31, cuda_seconds)
    torch.cuda.empty_cache()
    return found


def _measured(device: str, dtype, size: int, num_bytes: int, seconds) -> Peaks:
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = seconds(lambda: left @ right), seconds(lambda: target.copy_(source))
    return Peaks(2 * size**3 / product, 2 * num_bytes / copy)


def cuda_seconds(call, warmups: int = 3, times: int = 10) -> float:
    import torch

    for _ in range(warmups):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def cpu_seconds(call, times: int = 5) -> float:
    call()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
