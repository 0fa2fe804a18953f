"""The plain vision transformer that CLIP's and SigLIP's towers are made of: patches, then blocks.

Tokens of many images stand packed in one row; an `AttentionPlan` says which belong together, so
equal tiles are one dense batch and images of any size need no padding. Knows no resize, no
position table and no projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.attention import AttentionPlan, plan_attention, varlen_attention
from pipeline.kernels.rope import rotate
from pipeline.models.layers import MLP, LayerNorm, Linear
from pipeline.models.loading import Weights


@dataclass(frozen=True)
class VitConfig:
    """Sizes in values and pixels. `depth` blocks run; a checkpoint may hold more of them."""

    depth: int
    size: int
    heads: int
    inner: int
    patch: int
    side: int  # pixels of the square image that the position table is for
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    channels: int = 3

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch**2


def check_heads(size: int, heads: int, multiple: int = 1) -> None:
    """Refuse a tower whose heads do not share its values evenly, by `multiple` values each."""
    if heads < 1 or size % (multiple * heads):
        width = "" if multiple == 1 else f" whose width is a multiple of {multiple}"
        raise UserError(f"{size} values of an image tower are no {heads} heads{width}.")


def vit_config(vision: Mapping[str, Any], depth: int | None = None) -> VitConfig:
    """Read a `vision_config` of transformers; `depth` where not all of its layers are run."""
    return VitConfig(
        depth=vision["num_hidden_layers"] if depth is None else depth,
        size=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        inner=vision["intermediate_size"],
        patch=vision["patch_size"],
        side=vision["image_size"],
        act=vision.get("hidden_act", "gelu_pytorch_tanh"),
        eps=float(vision.get("layer_norm_eps", 1e-6)),
    )


@dataclass(frozen=True)
class BlockNames:
    """How a layout calls the parts of a block; three names of `qkv`, or one that is merged."""

    blocks: str = "encoder.layers"
    norm1: str = "layer_norm1"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.out_proj"
    norm2: str = "layer_norm2"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")


HF_BLOCKS = BlockNames()
TIMM_BLOCKS = BlockNames("blocks", "norm1", ("attn.qkv",), "attn.proj", "norm2")


@dataclass(slots=True)
class Block:
    """One block's weights: norms before attention and before the MLP."""

    norm1: LayerNorm
    qkv: Linear
    out: Linear
    norm2: LayerNorm
    mlp: MLP


def _take_block(weights: Weights, name: str, c: VitConfig, names: BlockNames) -> Block:
    parts = [f"{name}.{part}" for part in names.qkv]
    rows = [3 * c.size // len(parts)] * len(parts)
    first, second = (f"{name}.{part}" for part in names.mlp)
    return Block(
        norm1=LayerNorm.take(weights, f"{name}.{names.norm1}", c.size, c.eps),
        qkv=Linear.merged(weights, parts, rows, c.size),
        out=Linear.take(weights, f"{name}.{names.out}", c.size, c.size),
        norm2=LayerNorm.take(weights, f"{name}.{names.norm2}", c.size, c.eps),
        mlp=MLP.take(weights, (first, second), (c.size, c.inner, c.size), c.act),
    )


class Blocks:
    """Packed tokens [T, C] through `depth` blocks; with `more` a checkpoint may hold later ones."""

    def __init__(
        self, weights: Weights, config: VitConfig, name: str, names: BlockNames = HF_BLOCKS,
        more: bool = True,
    ) -> None:  # fmt: skip
        self.config = config
        check_heads(config.size, config.heads)
        stem = f"{name}.{names.blocks}"
        self.blocks = [
            _take_block(weights, f"{stem}.{i}", config, names) for i in range(config.depth)
        ]
        extra = config.depth
        while more and weights.drop_all(f"{stem}.{extra}."):
            extra += 1

    def __call__(
        self, x: Tensor, plan: AttentionPlan, norm: LayerNorm | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the last block's output, through `norm` where one is given.

        `angles` are the cosines and sines [T, D/2] that rotate queries and keys.
        """
        if not self.blocks:
            return x if norm is None else norm(x)[0]
        normed, x = self.blocks[0].norm1(x)
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            normed, x = block.norm2(block.out(self._attend(block, normed, plan, angles)), x)
            out = block.mlp(normed)
            after = norm if following is None else following.norm1
            if after is None:
                return x + out
            normed, x = after(out, x)
        return normed

    def _attend(
        self, block: Block, x: Tensor, plan: AttentionPlan, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        heads = self.config.heads
        q, k, v = block.qkv(x).view(len(x), 3, heads, -1).unbind(1)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return varlen_attention(q, k, v, plan, q.shape[-1] ** -0.5).flatten(1)


class PatchEmbed:
    """Patches [..., channels * patch²] to values: a convolution whose steps are its own size."""

    def __init__(self, weights: Weights, config: VitConfig, name: str, bias: bool) -> None:
        c = config
        weight = weights.take(f"{name}.weight", (c.size, c.channels, c.patch, c.patch))
        offset = weights.take(f"{name}.bias", (c.size,)) if bias else None
        self.linear = Linear(weight.flatten(1), offset)

    def __call__(self, patches: Tensor) -> Tensor:
        return self.linear(patches)


def image_patches(
    images: Tensor,
    patch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, N, 3 * patch²], normalised, rows of patches after one another.

    What is left of a side after its whole patches (384 = 27 * 14 + 6) is not seen. Arithmetic is
    the processors': `x * (1/255)` in float64, then in float32 minus the mean, over the deviation.
    """
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    seen = images[:, : rows * patch, : columns * patch]
    scaled = (seen.double() * (1.0 / 255.0)).float()
    pixels = (scaled - row(mean, images.device)) / row(std, images.device)
    cut = pixels.to(dtype).reshape(len(images), rows, patch, columns, patch, -1)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(len(images), rows * columns, -1)


@lru_cache(maxsize=64)
def row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as a float32 row on the device."""
    # NOTE: made once; a copy from the host at each call would wait for the device.
    return torch.tensor(values, dtype=torch.float32).to(device)


@lru_cache(maxsize=64)
def uniform_plan(count: int, length: int) -> AttentionPlan:
    """Return the plan of `count` images of `length` tokens each."""
    return plan_attention([length] * count)
