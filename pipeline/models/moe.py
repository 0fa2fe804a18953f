"""A mixture of experts in place of an MLP: router, routed experts, shared experts.

The router works in float32 and may choose by other scores than it weighs with (DeepSeek-V3's
correction bias), and within few groups of experts. Knows no attention; nothing here waits for the
device. Source: DeepSeek-AI, "DeepSeekMoE" (2024) and "DeepSeek-V3" (2024), section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.kernels.grouped_gemm import ExpertWeights, routed_experts
from pipeline.kernels.router import choose_experts
from pipeline.models.fp8 import quantize_block
from pipeline.models.layers import GatedMLP, padded
from pipeline.models.loading import Weights


@dataclass(frozen=True)
class MoeConfig:
    """Which layers are mixtures, of what, and how the router chooses."""

    num_experts: int
    top_k: int
    inner: int  # of one routed expert
    shared_inner: int = 0  # of the shared experts together; 0: there are none
    first: int = 0  # layers before it have a plain MLP
    every: int = 1  # among the layers, one in so many is a mixture
    sigmoid: bool = False  # scores; else softmax
    correction: bool = False  # experts are chosen by score and bias
    num_groups: int = 1
    top_groups: int = 1  # groups that a token may choose from
    normalised: bool = False  # weights sum to one before they are scaled
    scaling: float = 1.0

    def at(self, layer: int) -> bool:
        return layer >= self.first and layer % self.every == 0


def moe_config(text: Mapping[str, Any]) -> MoeConfig | None:
    """Read the keys of DeepSeek's text configs; None where there are no experts."""
    experts = text.get("n_routed_experts")
    if experts is None:
        return None
    method = text.get("topk_method", "greedy")
    scoring = text.get("scoring_func", "softmax")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise UserError(f"config.json: the topk_method {method!r} is unknown")
    if scoring not in ("softmax", "sigmoid"):
        raise UserError(f"config.json: the scoring_func {scoring!r} is unknown")
    grouped = method != "greedy"
    inner, top = text["moe_intermediate_size"], text["num_experts_per_tok"]
    return MoeConfig(
        num_experts=experts,
        top_k=top,
        inner=inner,
        shared_inner=inner * (text.get("n_shared_experts") or 0),
        first=text.get("first_k_dense_replace", 0),
        every=text.get("moe_layer_freq", 1),
        sigmoid=scoring == "sigmoid",
        correction=method == "noaux_tc",
        num_groups=(text.get("n_group") or 1) if grouped else 1,
        top_groups=(text.get("topk_group") or 1) if grouped else 1,
        normalised=bool(text.get("norm_topk_prob", False)) and top > 1,
        scaling=float(text.get("routed_scaling_factor", 1.0)),
    )


def route(x: Tensor, weight: Tensor, bias: Tensor | None, c: MoeConfig) -> tuple[Tensor, Tensor]:
    """Each token's experts int32 [T, K] and their weights float32 [T, K]."""
    logits = functional.linear(x.float(), weight)
    groups = (c.num_groups, c.top_groups)
    return choose_experts(logits, bias, c.top_k, c.sigmoid, c.normalised, c.scaling, groups)


@dataclass(slots=True)
class MoE:
    """`sum of weight * expert(x) + shared(x)`."""

    config: MoeConfig
    router: Tensor  # float32 [E, H]
    bias: Tensor | None  # float32 [E]
    experts: ExpertWeights
    mlp: GatedMLP | None  # the shared experts

    @classmethod
    def take(cls, weights: Weights, name: str, size: int, c: MoeConfig, act: str) -> MoE:
        if act != "silu":
            raise UserError(f"Experts with the activation {act!r} are not supported.")
        bias = None
        if c.correction:
            key = f"{name}.gate.e_score_correction_bias"
            bias = weights.take(key, (c.num_experts,), torch.float32)
        router = weights.take(f"{name}.gate.weight", (c.num_experts, size), torch.float32)
        shared = None
        if c.shared_inner:
            stem = f"{name}.shared_experts"
            shared = GatedMLP.take(weights, stem, size, c.shared_inner, bias=False, act=act)
        return cls(c, router, bias, _take_experts(weights, name, size, c), shared)

    def __call__(self, x: Tensor) -> Tensor:
        chosen, by = route(x, self.router, self.bias, self.config)
        out = routed_experts(x, chosen, by, self.experts)
        return out if self.mlp is None else out + self.mlp(x)

    def quantize(self) -> None:
        """All experts to float8; the router stays."""
        self.experts = self.experts.quantized()
        quantize_block(self, {})


def _take_experts(weights: Weights, name: str, size: int, c: MoeConfig) -> ExpertWeights:
    """All experts' maps as two tensors; the inner width is padded with zeros."""
    wide, kind, device = padded(c.inner), weights.dtype, weights.device
    gate_up = torch.zeros(c.num_experts, 2, wide, size, dtype=kind, device=device)
    down = torch.zeros(c.num_experts, size, wide, dtype=kind, device=device)
    for e in range(c.num_experts):
        stem = f"{name}.experts.{e}"
        gate_up[e, 0, : c.inner] = weights.take(f"{stem}.gate_proj.weight", (c.inner, size))
        gate_up[e, 1, : c.inner] = weights.take(f"{stem}.up_proj.weight", (c.inner, size))
        down[e, :, : c.inner] = weights.take(f"{stem}.down_proj.weight", (size, c.inner))
    return ExpertWeights(gate_up.flatten(1, 2), down)
