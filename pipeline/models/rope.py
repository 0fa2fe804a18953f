"""Rotary position embedding of decoders: angles for one or several position axes.

Reads the keys that configs use for it, old (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`), and computes cosines and sines for NeoX half rotation. Knows nothing of how
they are applied (`pipeline.kernels.rope`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. `sections` gives each axis its share of the frequencies."""

    theta: float
    dim: int  # rotated values of a head, frequencies twice
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    @property
    def num_axes(self) -> int:
        return min(max(1, len(self.sections)), 3)


def rope_config(
    text: Mapping[str, Any], head_dim: int, default_theta: float = 10000.0
) -> RopeConfig:
    """Read the rotary settings of a text config."""
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    scaling = {key: value for key, value in given.items() if value is not None}
    theta = scaling.get("rope_theta", text.get("rope_theta") or default_theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    longest = text.get("max_position_embeddings")
    length = scaling.setdefault("original_max_position_embeddings", longest)
    if kind == "yarn" and "factor" in given and longest and length:
        scaling.setdefault("factor", longest / length)
    share = scaling.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0
    if not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"config.json: rope_theta is {theta!r}, which is no positive number")
    return RopeConfig(
        theta=float(theta),
        dim=int(head_dim * share),
        kind="default" if kind == "mrope" else kind,
        scaling=scaling,
        sections=tuple(scaling.get("mrope_section") or ()),
        interleaved=bool(scaling.get("mrope_interleaved", False)),
    )


def _default(config: RopeConfig) -> torch.Tensor:
    steps = torch.arange(0, config.dim, 2, dtype=torch.float32)
    return 1.0 / (config.theta ** (steps / config.dim))


def _plain(config: RopeConfig) -> tuple[torch.Tensor, float]:
    return _default(config), 1.0


def _linear(config: RopeConfig) -> tuple[torch.Tensor, float]:
    return _default(config) / config.scaling["factor"], 1.0


def _llama3(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    s = config.scaling
    inv_freq = _default(config)
    length, low, high = (
        s["original_max_position_embeddings"],
        s["low_freq_factor"],
        s["high_freq_factor"],
    )
    wave = 2 * math.pi / inv_freq
    slow = inv_freq / s["factor"]
    blend = (length / wave - low) / (high - low)
    mixed = (1 - blend) * slow + blend * inv_freq
    out = torch.where(wave > length / low, slow, mixed)
    return torch.where(wave < length / high, inv_freq, out), 1.0


def _yarn(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Frequencies blended by how often they turn in the original length; angles' size grows."""
    s = config.scaling
    factor, length = s["factor"], s["original_max_position_embeddings"]

    def turns_at(turns: float) -> float:
        span = math.log(length / (turns * 2 * math.pi))
        return config.dim * span / (2 * math.log(config.theta))

    low, high = turns_at(s.get("beta_fast") or 32), turns_at(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    steps = torch.arange(config.dim // 2, dtype=torch.float32)
    kept = 1 - ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = _default(config)
    return inv_freq / factor * (1 - kept) + inv_freq * kept, _yarn_size(s, factor)


def _yarn_size(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if top and bottom:
        return yarn_growth(factor, top) / yarn_growth(factor, bottom)
    return yarn_growth(factor)


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN lets queries and keys grow in a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_KINDS = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _axis_of_frequency(config: RopeConfig) -> list[int]:
    """Say which position axis turns each frequency."""
    half = config.dim // 2
    if not config.sections:
        return [0] * half
    if not config.interleaved and sum(config.sections) != half:
        raise UserError(
            f"mrope_section {list(config.sections)} does not add up to {half} frequencies."
        )
    if not config.interleaved:
        return [index % 3 for index, size in enumerate(config.sections) for _ in range(size)]
    axes = [0] * half
    for axis, size in list(enumerate(config.sections))[1:]:
        for index in range(axis, min(size * 3, half), 3):
            axes[index] = axis
    return axes


class Rope:
    """Positions of all axes [axes, T] to cosines and sines [T, D/2] in float32."""

    def __init__(self, config: RopeConfig, device: torch.device | str) -> None:
        if config.kind not in _KINDS:
            known = ", ".join(_KINDS)
            raise UserError(f"The rope type {config.kind!r} is unknown; known: {known}.")
        try:
            inv_freq, self.size = _KINDS[config.kind](config)
        except KeyError as error:
            raise UserError(
                f"rope_scaling of type {config.kind!r} lacks the key {error.args[0]!r}."
            ) from error
        self.config = config
        self.inv_freq = inv_freq.to(device)
        self.axes = torch.tensor(_axis_of_frequency(config), device=device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if positions.shape[0] == 1 or not self.config.sections:
            angles = positions[0, :, None].float() * self.inv_freq
        else:
            angles = positions.index_select(0, self.axes).T.contiguous().float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.size == 1.0 else (cos * self.size, sin * self.size)
