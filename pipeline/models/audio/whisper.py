"""Whisper's encoder on pieces of any length, hearing in chunks: no piece is padded to 30 seconds.

A frame attends to its own chunk and to all before it. Pieces of one length are a dense rectangle.
Knows no projector and no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.attention import dense_attention
from pipeline.models.layers import MLP, LayerNorm, Linear, activation
from pipeline.models.loading import Weights
from pipeline.models.vision.vit import Block

EPS = 1e-5


@dataclass(frozen=True)
class WhisperConfig:
    """What a checkpoint's audio config says; `chunk` in frames after the convolutions."""

    depth: int
    size: int
    heads: int
    inner: int
    bins: int
    positions: int
    chunk: int
    act: str = "gelu"


@dataclass(frozen=True, slots=True)
class Shape:
    """Pieces that are encoded alike: `frames` are computed, those from `heard` on unheard."""

    mel_frames: int  # of the convolutions' input
    frames: int
    heard: int


def _take_block(weights: Weights, name: str, c: WhisperConfig) -> Block:
    attention = f"{name}.self_attn"
    parts = [f"{attention}.{part}_proj.weight" for part in "qkv"]
    weight = weights.take_rows(parts, [c.size] * 3, c.size)
    bias = torch.zeros(3 * c.size, dtype=weights.dtype, device=weights.device)
    bias[: c.size] = weights.take(f"{attention}.q_proj.bias", (c.size,))
    bias[2 * c.size :] = weights.take(f"{attention}.v_proj.bias", (c.size,))
    return Block(
        norm1=LayerNorm.take(weights, f"{name}.self_attn_layer_norm", c.size, EPS),
        qkv=Linear(weight, bias),
        out=Linear.take(weights, f"{attention}.out_proj", c.size, c.size),
        norm2=LayerNorm.take(weights, f"{name}.final_layer_norm", c.size, EPS),
        mlp=MLP.take(weights, (f"{name}.fc1", f"{name}.fc2"), (c.size, c.inner, c.size), c.act),
    )


class WhisperEncoder:
    """Log-mel spectrograms to features, after the last norm."""

    def __init__(self, weights: Weights, config: WhisperConfig, name: str) -> None:
        c = self.config = config
        self.first = weights.take(f"{name}.conv1.weight", (c.size, c.bins, 3))
        self.first_bias = weights.take(f"{name}.conv1.bias", (c.size,))
        self.second = weights.take(f"{name}.conv2.weight", (c.size, c.size, 3))
        self.second_bias = weights.take(f"{name}.conv2.bias", (c.size,))
        self.table = weights.take(f"{name}.embed_positions.weight", (c.positions, c.size))
        self.blocks = [_take_block(weights, f"{name}.layers.{i}", c) for i in range(c.depth)]
        self.norm = LayerNorm.take(weights, f"{name}.layer_norm", c.size, EPS)
        self.act = activation(c.act)
        self._mask = lru_cache(64)(self._make_mask)

    def __call__(self, mels: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """`mels` [B, bins, mel frames] of each shape -> features [B, frames, C] of each."""
        starts = [self._start(mel, shape) for mel, shape in zip(mels, shapes, strict=True)]
        counts = [len(mel) for mel in mels]
        x = torch.cat([start.flatten(0, 1) for start in starts])
        normed, x = self.blocks[0].norm1(x)
        for index, block in enumerate(self.blocks):
            heard = self._attend(block.qkv(normed), shapes, counts)
            normed, x = block.norm2(block.out(heard), x)
            last = index + 1 == len(self.blocks)
            following = self.norm if last else self.blocks[index + 1].norm1
            normed, x = following(block.mlp(normed), x)
        sizes = [count * shape.frames for count, shape in zip(counts, shapes, strict=True)]
        parts = normed.split(sizes)
        return [part.view(n, -1, self.config.size) for n, part in zip(counts, parts, strict=True)]

    def _start(self, mel: Tensor, shape: Shape) -> Tensor:
        x = mel.to(self.first.dtype)
        # The convolutions' activation is GELU whatever the layers' is.
        x = F.gelu(F.conv1d(x, self.first, self.first_bias, padding=1))
        x = F.gelu(F.conv1d(x, self.second, self.second_bias, stride=2, padding=1))
        return x[:, :, : shape.frames].transpose(1, 2) + self.table[: shape.frames]

    def _attend(self, qkv: Tensor, shapes: Sequence[Shape], counts: Sequence[int]) -> Tensor:
        out, start = torch.empty_like(qkv[:, : self.config.size]), 0
        for shape, count in zip(shapes, counts, strict=True):
            stop = start + count * shape.frames
            heads = qkv[start:stop].view(count, shape.frames, 3, self.config.heads, -1)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            mask = self._mask(shape.frames, shape.heard)
            found = dense_attention(q, k, v, mask=mask)
            out[start:stop] = found.transpose(1, 2).reshape(stop - start, -1)
            start = stop
        return out

    def _make_mask(self, frames: int, heard: int) -> Tensor:
        at = torch.arange(frames, device=self.first.device)
        seen = at[None] < (at[:, None] // self.config.chunk + 1) * self.config.chunk
        return seen & (at[None] < heard)
