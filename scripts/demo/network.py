"""The Qwen2.5-VL network for training: fixed image size, packed sequences, whole batches at once.

The names of the parameters are those of the published checkpoints, so that `state_dict()` is the
file. It computes what transformers' class computes; checkpoint.py writes the configuration.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The numbers of the architecture."""

    vocabulary: int = 1088
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    theta: float = 10.0
    mrope: tuple[int, int, int] = (4, 14, 14)
    vision_hidden: int = 192
    vision_depth: int = 6
    vision_heads: int = 6
    vision_intermediate: int = 512
    full_blocks: tuple[int, ...] = (2, 5)
    window: int = 112
    rows: int = 6  # of merged cells, 28 pixels each
    columns: int = 8


class RMSNorm(nn.Module):
    """Root mean square normalisation in float32."""

    def __init__(self, size: int):
        """A weight for each channel."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [b, heads, n, d], in float32."""
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, size: int, inner: int, bias: bool):
        """`bias` in the vision tower only."""
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    """Attention over all patches, or within windows that lie one after another."""

    def __init__(self, shape: Shape, windows: tuple[tuple[int, int], ...]):
        """`windows`: (how many, patches in each); empty for full attention."""
        super().__init__()
        self.heads, self.windows = shape.vision_heads, windows
        self.qkv = nn.Linear(shape.vision_hidden, 3 * shape.vision_hidden)
        self.proj = nn.Linear(shape.vision_hidden, shape.vision_hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, patches, hidden]."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not self.windows:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            parts, start = [], 0
            for count, size in self.windows:
                span = slice(start, start + count * size)
                split = [
                    t[:, :, span]
                    .reshape(b, self.heads, count, size, -1)
                    .transpose(1, 2)
                    .flatten(0, 1)
                    for t in (q, k, v)
                ]
                part = F.scaled_dot_product_attention(*split)
                parts.append(
                    part.view(b, count, self.heads, size, -1).transpose(1, 2).flatten(2, 3)
                )
                start += count * size
            out = torch.cat(parts, 2)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class VisionBlock(nn.Module):
    """One block of the vision tower."""

    def __init__(self, shape: Shape, windows: tuple[tuple[int, int], ...]):
        """Windows as in VisionAttention."""
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(shape.vision_hidden), RMSNorm(shape.vision_hidden)
        self.attn = VisionAttention(shape, windows)
        self.mlp = MLP(shape.vision_hidden, shape.vision_intermediate, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Same shape."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The 3-D convolution over one patch, as a matrix product."""

    def __init__(self, size: int):
        """Weights shaped like Conv3d's."""
        super().__init__()
        self.proj = nn.Conv3d(3, size, (2, 14, 14), (2, 14, 14), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[b, patches, 1176] → [b, patches, hidden]."""
        return F.linear(patches, self.proj.weight.flatten(1))


class Merger(nn.Module):
    """Four patches become one token of the language model."""

    def __init__(self, size: int, out: int):
        """From the tower's width to the language model's."""
        super().__init__()
        self.ln_q = RMSNorm(size)
        self.mlp = nn.Sequential(nn.Linear(4 * size, 4 * size), nn.GELU(), nn.Linear(4 * size, out))

    def forward(self, x: Tensor) -> Tensor:
        """[b, patches, hidden] → [b, cells, out]."""
        x = self.ln_q(x)
        return self.mlp(x.reshape(x.shape[0], x.shape[1] // 4, -1))


def window_order(rows: int, columns: int, side: int) -> tuple[list[int], list[int]]:
    """Cells in the order of their windows (side × side cells), and the cells in each window."""
    order, sizes = [], []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            cells = [
                r * columns + c
                for r in range(top, min(top + side, rows))
                for c in range(left, min(left + side, columns))
            ]
            order += cells
            sizes.append(len(cells))
    return order, sizes


def runs(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """[16, 16, 8, 8] cells → ((2, 64), (2, 32)) patches."""
    out: list[tuple[int, int]] = []
    for size in sizes:
        if out and out[-1][1] == size * 4:
            out[-1] = (out[-1][0] + 1, size * 4)
        else:
            out.append((1, size * 4))
    return tuple(out)


class Vision(nn.Module):
    """The vision tower for one fixed grid."""

    def __init__(self, shape: Shape):
        """Prepares the window order and the rotary angles."""
        super().__init__()
        order, sizes = window_order(shape.rows, shape.columns, shape.window // 28)
        self.patch_embed = PatchEmbed(shape.vision_hidden)
        self.blocks = nn.ModuleList(
            VisionBlock(shape, () if i in shape.full_blocks else runs(sizes))
            for i in range(shape.vision_depth)
        )
        self.merger = Merger(shape.vision_hidden, shape.hidden)
        cells = torch.tensor(order)
        inner = torch.arange(4)
        h = (cells // shape.columns * 2)[:, None] + inner // 2
        w = (cells % shape.columns * 2)[:, None] + inner % 2
        quarter = shape.vision_hidden // shape.vision_heads // 2
        inverse = 1.0 / 10000 ** (torch.arange(0, quarter, 2).float() / quarter)
        angles = torch.cat([h.flatten()[:, None] * inverse, w.flatten()[:, None] * inverse], 1)
        angles = torch.cat([angles, angles], 1)
        self.register_buffer("order", (cells[:, None] * 4 + inner).flatten(), persistent=False)
        self.register_buffer("back", torch.argsort(cells), persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[b, patches, 1176] → [b, cells, hidden of the language model]."""
        x = self.patch_embed(patches[:, self.order])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.merger(x)[:, self.back]


class Attention(nn.Module):
    """Grouped-query attention under a given mask."""

    def __init__(self, shape: Shape):
        """Biases on queries, keys and values, as in Qwen2."""
        super().__init__()
        self.heads, self.kv_heads, self.size = (
            shape.heads,
            shape.kv_heads,
            shape.hidden // shape.heads,
        )
        self.q_proj = nn.Linear(shape.hidden, shape.hidden)
        self.k_proj = nn.Linear(shape.hidden, self.kv_heads * self.size)
        self.v_proj = nn.Linear(shape.hidden, self.kv_heads * self.size)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[b, n, hidden]; `mask` [1, 1, n, n], added to the scores."""
        b, n, d = x.shape
        q = rotate(self.q_proj(x).view(b, n, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        times = self.heads // self.kv_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.to(q.dtype).expand(b, self.heads, n, n)
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, n, d))


class Layer(nn.Module):
    """One layer of the language model."""

    def __init__(self, shape: Shape):
        """Attention, then MLP."""
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(shape.hidden),
            RMSNorm(shape.hidden),
        )
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.hidden, shape.intermediate, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    """The language model; its embedding is its output matrix too."""

    def __init__(self, shape: Shape):
        """Layers and embedding."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)


class Network(nn.Module):
    """Qwen2.5-VL over packed sequences of one layout."""

    def __init__(self, shape: Shape, positions: Tensor, mask: Tensor, image_at: int):
        """`positions` [3, n] and `mask` [n, n]: batches.Layout; the image starts at `image_at`."""
        super().__init__()
        self.shape, self.image_at = shape, image_at
        self.visual, self.model = Vision(shape), Text(shape)
        size = shape.hidden // shape.heads
        inverse = 1.0 / shape.theta ** (torch.arange(0, size, 2).float() / size)
        angles = positions[..., None].float() * inverse
        parts = angles.split(shape.mrope, -1)
        angles = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        bias = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min / 2)
        self.register_buffer("mask", bias[None, None], persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        depth = {"visual": self.shape.vision_depth, "model": self.shape.layers}
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                nn.init.normal_(p, std=0.04)
            else:
                std = 0.7 * p[0].numel() ** -0.5
                if (
                    name.split(".")[-2] in ("proj", "o_proj", "down_proj")
                    and "patch_embed" not in name
                ):
                    std *= (2 * depth[name.split(".")[0]]) ** -0.5
                nn.init.normal_(p, std=std)

    def forward(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states after the last norm, [b, n, hidden]."""
        image = self.visual(patches)
        words = self.model.embed_tokens(tokens)
        start, stop = self.image_at, self.image_at + image.shape[1]
        x = torch.cat([words[:, :start], image.to(words.dtype), words[:, stop:]], 1)
        for layer in self.model.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary."""
        return F.linear(hidden, self.model.embed_tokens.weight)
