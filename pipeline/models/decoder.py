"""The decoder that all families share: one class, its differences told by `DecoderConfig`.

Takes embedded tokens and positions and gives hidden states; attention over the KV cache is the
caller's (`Attend`), so the same code runs prefill, decode and tests. Knows no cache, no batch and
no family; issues no host synchronisation, so a CUDA graph can hold a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.head_norm import norm_heads
from pipeline.kernels.split_matmul import whole
from pipeline.models.cross import CrossParts, Shape, StateKeys, quantize_cross
from pipeline.models.fp8 import quantize_block
from pipeline.models.layers import GatedMLP, Linear, RMSNorm
from pipeline.models.loading import Weights
from pipeline.models.mla import MlaConfig, take_mla
from pipeline.models.moe import MoE, MoeConfig
from pipeline.models.rope import Rope, RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """What tells one family's decoder from another's; widths in values, windows in tokens."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    scale: float  # of query·key
    rope: RopeConfig
    local_rope: RopeConfig | None = None  # of layers with a window, where it differs
    windows: tuple[int | None, ...] = ()  # each layer's sliding window; empty: none has one
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # 1.0: norms multiply by 1 + weight
    post_norms: bool = False  # norms after attention and MLP too (Gemma)
    act: str = "silu"
    softcap: float | None = None  # of attention scores
    image_spans: bool = False  # tokens of one image see each other (Gemma 3)
    logit_softcap: float | None = None
    embed_scale: float | None = None
    tied: bool = False
    mla: MlaConfig | None = None  # then one KV head of `mla.row` values, which is key and value
    moe: MoeConfig | None = None
    cross_layers: tuple[int, ...] = ()  # which attend to image states, not to tokens

    @property
    def num_cached_layers(self) -> int:
        """Layers that keep keys and values of tokens."""
        return self.num_layers - len(self.cross_layers)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


def _check(values: Mapping[str, Any]) -> None:
    """Raises UserError where a config file's value can be none of a decoder's."""
    for name in _SIZES:
        if not isinstance(values[name], int) or values[name] < 1:
            raise UserError(f"config.json: {name} is {values[name]!r}, which is no positive number")
    for name in ("eps", "scale", "softcap", "logit_softcap"):
        value = values.get(name)
        given = value is not None or name in ("eps", "scale")
        if given and not isinstance(value, int | float):
            raise UserError(f"config.json: {name} is {value!r}, which is no number")
    for window in values.get("windows", ()):
        if window is not None and (type(window) is not int or window < 1):
            raise UserError(f"config.json: a window of {window!r} tokens is no positive number")


_SIZES = (
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def common_config(text: Mapping[str, Any], rope: RopeConfig, **differences: Any) -> DecoderConfig:
    """Read the keys that all text configs share; a family adds its `differences`."""
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    if rope.dim != head_dim and "mla" not in differences:
        raise UserError("partial_rotary_factor in the model's config is not supported.")
    values: dict[str, Any] = {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab_size": text["vocab_size"],
        "eps": float(text.get("rms_norm_eps", 1e-6)),
        "scale": head_dim**-0.5,
        "act": text.get("hidden_act", "silu"),
        "rope": rope,
    }
    values |= differences
    _check(values)
    return DecoderConfig(**values)


def sliding_windows(size: Any, near: Sequence[bool]) -> tuple[int | None, ...]:
    """Each layer's window: `size` where the layer is `near`, or a UserError where none is told."""
    if size is None and any(near):
        raise UserError("layer_types names sliding_attention, and the config has no window for it.")
    return tuple(size if n else None for n in near)


def llama_biases(text: Mapping[str, Any]) -> dict[str, bool]:
    """The biases that a Llama text config asks for."""
    bias = bool(text.get("attention_bias"))
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(text.get("mlp_bias"))}


class Attend(Protocol):
    """Attention with a cache, the caller's. Rotates queries and keys, stores keys and values."""

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, last: Tensor | None
    ) -> Tensor:
        """Return the heads' outputs [n, Hq * D]: of the rows `last`, or of all when it is None.

        With `mla`, `qkv` is [T, (Hq + 1) * D] and the outputs are [n, Hq * rank].
        """
        ...


class CrossAttend(Attend, Protocol):
    """`Attend` of a decoder with cross-attention layers, for whose rows `qkv` is queries alone."""

    def shown(self, last: Tensor | None) -> Tensor:
        """Which rows see an image, bool [n, 1]."""
        ...


@dataclass(slots=True)
class DecoderLayer:
    """One layer's weights; the two post norms are Gemma's."""

    attention_norm: RMSNorm
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    mlp_norm: RMSNorm
    mlp: Callable[[Tensor], Tensor]
    head_norm: Tensor | None = None  # [Hq + Hk, D]
    post_attention_norm: RMSNorm | None = None
    post_mlp_norm: RMSNorm | None = None
    cross: StateKeys | None = None  # of a layer that attends to image states


def _take_head_norm(weights: Weights, name: str, c: DecoderConfig) -> Tensor:
    """Return the norms of query and key heads as one weight, a row a head."""
    dtype = torch.float32 if c.norm_offset else None
    q = weights.take(f"{name}.q_norm.weight", (c.head_dim,), dtype) + c.norm_offset
    k = weights.take(f"{name}.k_norm.weight", (c.head_dim,), dtype) + c.norm_offset
    return torch.cat([q.expand(c.num_heads, -1), k.expand(c.num_kv_heads, -1)]).contiguous()


def _take_attention(
    weights: Weights, name: str, c: DecoderConfig
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if c.mla is not None:
        return take_mla(weights, name, c.hidden_size, c.num_heads, c.mla)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = [f"{name}.{p}_proj" for p in "qkv"]
    sizes = [q_size, kv_size, kv_size]
    qkv = Linear.merged(weights, parts, sizes, c.hidden_size, c.qkv_bias)
    return qkv, Linear.take(weights, f"{name}.o_proj", c.hidden_size, q_size, c.out_bias)


def _take_mlp(
    weights: Weights, name: str, c: DecoderConfig, index: int
) -> Callable[[Tensor], Tensor]:
    if c.moe is not None and c.moe.at(index):
        return MoE.take(weights, name, c.hidden_size, c.moe, c.act)
    return GatedMLP.take(weights, name, c.hidden_size, c.intermediate_size, c.mlp_bias, c.act)


def _take_layer(weights: Weights, name: str, c: DecoderConfig, index: int) -> DecoderLayer:
    if index in c.cross_layers:
        layer = _take_cross_layer(weights, name, c)
    else:
        layer = _take_plain_layer(weights, name, c, index)
    if weights.float8:
        quantize_layer(layer)
    return layer


def quantize_layer(layer: DecoderLayer) -> None:
    """Turn the layer's linear maps to float8."""
    quantize_block(layer, {"qkv": "attention_norm", "mlp": "mlp_norm"}, parts=("out", "mlp"))
    if layer.cross is not None:
        quantize_cross(layer)


def _take_plain_layer(weights: Weights, name: str, c: DecoderConfig, index: int) -> DecoderLayer:
    def norm(part: str) -> RMSNorm:
        return RMSNorm.take(weights, f"{name}.{part}", c.hidden_size, c.eps, c.norm_offset)

    attention = f"{name}.self_attn"
    qkv, out = _take_attention(weights, attention, c)
    mlp_norm = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    return DecoderLayer(
        attention_norm=norm("input_layernorm"),
        qkv=qkv,
        out=out,
        mlp_norm=norm(mlp_norm),
        mlp=_take_mlp(weights, f"{name}.mlp", c, index),
        head_norm=_take_head_norm(weights, attention, c) if c.qk_norm else None,
        post_attention_norm=norm("post_attention_layernorm") if c.post_norms else None,
        post_mlp_norm=norm("post_feedforward_layernorm") if c.post_norms else None,
    )


def _take_cross_layer(weights: Weights, name: str, c: DecoderConfig) -> DecoderLayer:
    shape = Shape(
        c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.eps, c.act
    )
    parts = CrossParts.take(weights, name, shape)
    return DecoderLayer(
        attention_norm=RMSNorm.take(weights, f"{name}.input_layernorm", c.hidden_size, c.eps),
        qkv=parts.queries,
        out=parts.out,
        mlp_norm=RMSNorm.take(weights, f"{name}.post_attention_layernorm", c.hidden_size, c.eps),
        mlp=parts.mlp,
        cross=parts.keys,
    )


def _take_head(weights: Weights, c: DecoderConfig, embedding: Tensor) -> Linear:
    """The file's own head, or the embedding for a tied one.

    A tied checkpoint that was tuned may hold a head of other values; it counts, as in transformers.
    """
    if c.tied and not weights.has("lm_head.weight"):
        return Linear(embedding)
    head = Linear.take(weights, "lm_head", c.vocab_size, c.hidden_size, bias=False)
    same = c.tied and torch.equal(head.weight, embedding[: c.vocab_size])
    return Linear(embedding) if same else head


class Decoder:
    """Embedded tokens to hidden states to logits."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        device: torch.device,
    ) -> None:
        self.config = config
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = Rope(config.rope, device)
        self.local_rope = Rope(config.local_rope, device) if config.local_rope else None

    @classmethod
    def take(
        cls, weights: Weights, config: DecoderConfig, embedding: Tensor, name: str = "model"
    ) -> Decoder:
        """Take `<name>.layers.N`, `<name>.norm` and `lm_head`, or `embedding` for a tied head."""
        if config.windows and len(config.windows) != config.num_layers:
            raise UserError(
                f"config.json: layer_types names {len(config.windows)} layers of"
                f" {config.num_layers}"
            )
        if config.num_heads % config.num_kv_heads:
            raise UserError(
                f"config.json: {config.num_heads} attention heads are no multiple of"
                f" {config.num_kv_heads} key-value heads"
            )
        layers = [
            _take_layer(weights, f"{name}.layers.{i}", config, i) for i in range(config.num_layers)
        ]
        norm = RMSNorm.take(
            weights, f"{name}.norm", config.hidden_size, config.eps, config.norm_offset
        )
        return cls(config, layers, norm, _take_head(weights, config, embedding), weights.device)

    def __call__(
        self, x: Tensor, positions: Tensor, attend: Attend, last: Tensor | None = None
    ) -> Tensor:
        """Return hidden states [n, H] after the final norm, of the rows `last` or of all.

        `x` is [T, H], or [T, (1 + k) H] from `Model.embed`: then the k further parts are added
        after the first k layers (Qwen3-VL's deepstack). `positions` is int [axes, T].
        """
        size = self.config.hidden_size
        deep = x[:, size:].split(size, dim=1) if x.shape[1] > size else ()
        normed, x = self.layers[0].attention_norm(x[:, :size] if deep else x)
        angles = self._angles(positions)
        for index in range(len(self.layers)):
            rows = last if index == len(self.layers) - 1 else None
            normed, x = self._layer(index, normed, x, attend, angles, rows, deep)
        return normed

    def _angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's cosines and sines; layers of a kind share them."""
        wide = self.rope(positions)
        if self.local_rope is None:
            return [wide] * len(self.layers)
        near = self.local_rope(positions)
        c = self.config
        return [near if c.window(i) is not None else wide for i in range(c.num_layers)]

    def _layer(
        self,
        index: int,
        normed: Tensor,
        x: Tensor,
        attend: Attend,
        angles: list[tuple[Tensor, Tensor]],
        last: Tensor | None,
        deep: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the next layer, normed by that layer's norm, and unnormed."""
        layer = self.layers[index]
        attended = attend(index, self._qkv(layer, normed), *angles[index], last)
        if last is not None:
            x = x.index_select(0, last)
        out = layer.out(attended)
        if layer.post_attention_norm is not None:
            out = layer.post_attention_norm(out)[0]
        normed, x = layer.mlp_norm(out, x)
        out = layer.mlp(normed)
        if layer.cross is not None:
            out = out.masked_fill(~cast(CrossAttend, attend).shown(last), 0)
        if layer.post_mlp_norm is not None:
            out = layer.post_mlp_norm(out)[0]
        if index < len(deep):
            # NOTE: after the sum, as the reference rounds.
            x = x + whole(out)
            out = deep[index] if last is None else deep[index].index_select(0, last)
        end = index + 1 == len(self.layers)
        following = self.norm if end else self.layers[index + 1].attention_norm
        return following(out, x)

    def _qkv(self, layer: DecoderLayer, normed: Tensor) -> Tensor:
        qkv = layer.qkv(normed)
        if layer.head_norm is not None:
            heads = qkv.view(len(qkv), -1, self.config.head_dim)[:, : len(layer.head_norm)]
            norm_heads(heads, layer.head_norm, self.config.eps)
        return qkv

    def logits(self, hidden: Tensor, wide: bool = True) -> Tensor:
        """Return logits [n, V]: float32, or not `wide`, as the head gives them."""
        logits = self.head(hidden)
        if wide:
            logits = logits.float()
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def embed_tokens(table: Tensor, tokens: Tensor, scale: float | None) -> Tensor:
    """Look tokens up; a scale is rounded to the table's type first, as Gemma's."""
    x = F.embedding(tokens, table)
    return x if scale is None else x * torch.tensor(scale, dtype=x.dtype).item()
