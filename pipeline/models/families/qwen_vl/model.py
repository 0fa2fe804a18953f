"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL on a device: their tensor names, tower and decoder settings.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template and no token
but the image's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.kernels.patchify import patchify
from pipeline.kernels.resize import resize
from pipeline.kernels.transfer import upload
from pipeline.models.base import Model, check_token_ids
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig, common_config, sliding_windows
from pipeline.models.families.qwen_vl import spec
from pipeline.models.loading import Weights
from pipeline.models.rope import rope_config
from pipeline.models.vision.grids import Grid
from pipeline.models.vision.qwen import QwenTower, TowerConfig
from pipeline.models.vision.views import resize_frames
from pipeline.rows import ImageLayout

MAX_TOWER_TOKENS = 16_384  # of a video, in one pass of the tower

# The newer layout (Qwen3-VL, and whatever transformers 5 saves) to the hub's of Qwen2-VL.
RENAME = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def _qwen2_tower(v: Mapping[str, Any]) -> dict[str, Any]:
    size = v.get("embed_dim", 1280)
    return {
        "size": size,
        "inner": int(size * v.get("mlp_ratio", 4)),
        "out": v.get("hidden_size", 3584),
        "act": v.get("hidden_act", "quick_gelu"),
    }


def _qwen2_5_tower(v: Mapping[str, Any]) -> dict[str, Any]:
    patch, merge = v.get("patch_size", 14), v.get("spatial_merge_size", 2)
    window = v.get("window_size", 112) // merge // patch
    if not window:
        raise UserError(
            f"vision_config.window_size {v.get('window_size')} is less than an image token covers."
        )
    return {
        "size": v.get("hidden_size", 3584),
        "inner": v.get("intermediate_size", 3420),
        "out": v.get("out_hidden_size", 3584),
        "act": v.get("hidden_act", "silu"),
        "gated": True,
        "window": window,
        "full_blocks": frozenset(v.get("fullatt_block_indexes", (7, 15, 23, 31))),
    }


def _qwen3_tower(v: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "size": v.get("hidden_size", 1152),
        "inner": v.get("intermediate_size", 4304),
        "out": v.get("out_hidden_size", 3584),
        "act": v.get("hidden_act", "gelu_pytorch_tanh"),
        "table_rows": v.get("num_position_embeddings", 2304),
        "deepstack": tuple(v.get("deepstack_visual_indexes", (8, 16, 24))),
        "linear_names": ("linear_fc1", "linear_fc2"),
        "merger_names": ("norm", "linear_fc1", "linear_fc2"),
    }


# variant -> tower, and the depth and patch size that its config may leave out
_TOWERS = {
    "qwen2": (_qwen2_tower, 32, 14),
    "qwen2_5": (_qwen2_5_tower, 32, 14),
    "qwen3": (_qwen3_tower, 27, 16),
}


def tower_config(config: Mapping[str, Any], variant: str) -> TowerConfig:
    """Read the tower's settings from a checkpoint's config."""
    read, depth, patch = _TOWERS[variant]
    v = config["vision_config"]
    return TowerConfig(
        depth=v.get("depth", depth),
        heads=v.get("num_heads", 16),
        patch=v.get("patch_size", v.get("spatial_patch_size", patch)),
        temporal=v.get("temporal_patch_size", 2),
        merge=v.get("spatial_merge_size", 2),
        channels=v.get("in_channels", v.get("in_chans", 3)),
        theta=_tower_theta(v),
        **read(v),
    )


def _tower_theta(v: Mapping[str, Any]) -> float:
    rope = v.get("rope_scaling") or v.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "axial"
    if kind not in ("axial", "default"):
        raise UserError(f"The image tower's rope type {kind!r} is unknown; known: axial.")
    return float(rope.get("rope_theta") or v.get("rope_theta") or 1e4)


def decoder_config(config: Mapping[str, Any], variant: str) -> DecoderConfig:
    """Read the decoder's settings from a checkpoint's config, flat or nested."""
    text = spec.text_config(config)
    newer = variant == "qwen3"
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    rope = rope_config(text, head_dim, default_theta=5e5 if newer else 1e6)
    rope = replace(rope, interleaved=newer)  # whatever the file says
    if newer and len(rope.sections) != 3:
        raise UserError(f"mrope_section {list(rope.sections)} does not name three axes.")
    differences: dict[str, Any] = {"tied": spec.is_tied(config)}
    if newer:
        bias = bool(text.get("attention_bias", False))
        differences |= {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    else:
        differences |= {"qkv_bias": True, "windows": _windows(text)}
    return common_config(text, rope, **differences)


def _windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    size = text.get("sliding_window") if text.get("use_sliding_window") else None
    kinds = text.get("layer_types")
    if kinds is not None:
        near = [kind == "sliding_attention" for kind in kinds]
    else:
        first = text.get("max_window_layers", 80)
        near = [size is not None and i >= first for i in range(text["num_hidden_layers"])]
    return sliding_windows(size, near) if any(near) else ()


class QwenVL(Model):
    """A Qwen-VL checkpoint on one device."""

    invariant = True

    def __init__(
        self, family: spec.QwenVL, decoder: Decoder, embedding: Tensor, tower: QwenTower
    ) -> None:
        super().__init__(family, decoder, embedding)
        self.tower = tower
        self.mean = family.image_mean
        self.std = family.image_std
        self.video_token_id = family.video_token_id
        self.marks_frames = family.variant == "qwen3"

    @property
    def feature_size(self) -> int:
        return self.decoder.config.hidden_size * (1 + len(self.tower.deep))

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        sized = [_sized(image, layout) for image, layout in zip(images, layouts, strict=True)]
        grids = [layout.grid for layout in layouts]
        if sum(layout.num_tokens for layout in layouts) > MAX_TOWER_TOKENS:  # one long video
            parts = [part for image, grid in zip(sized, grids, strict=True)
                     for part in self._in_time(image, grid)]  # fmt: skip
            features = torch.cat([self._encode([image], [grid]) for image, grid in parts])
        else:
            features = self._encode(sized, grids)
        if self.marks_frames and any(layout.clip for layout in layouts):
            return self._with_marks(features, layouts)
        return features

    def _encode(self, images: list[Tensor], grids: list[Grid]) -> Tensor:
        c = self.tower.config
        patches = patchify(images, c.patch, c.merge, c.temporal, self.mean, self.std, self.dtype)
        return self.tower(patches, grids)

    def _in_time(self, image: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        """A video in parts that the tower takes at once; no frame sees another there."""
        if image.dim() == 3:
            yield image, grid
            return
        patches, rows, columns = grid
        step = max(1, MAX_TOWER_TOKENS * self.tower.config.merge**2 // (rows * columns))
        unit = self.tower.config.temporal
        for first in range(0, patches, step):
            count = min(step, patches - first)
            yield image[first * unit : (first + count) * unit], (count, rows, columns)

    def _with_marks(self, features: Tensor, layouts: list[ImageLayout]) -> Tensor:
        """A row for each token of the blocks: the times' and the frame marks' embeddings too."""
        ids = np.concatenate([self.family.image_tokens(layout) for layout in layouts])
        seen = (ids == self.family.image_token_id) | (ids == self.video_token_id)
        places = upload(np.flatnonzero(seen), self.device)
        marks = upload(np.flatnonzero(~seen), self.device)
        embedded = self.embedding[upload(ids[~seen].astype(np.int64), self.device)]
        rows = features.new_zeros(len(ids), features.shape[1])
        rows.index_copy_(0, places, features)
        wide = features.new_zeros(len(embedded), features.shape[1])
        wide[:, : embedded.shape[1]] = embedded
        return rows.index_copy_(0, marks, wide)


def _sized(image: Tensor, layout: ImageLayout) -> Tensor:
    """The image, or each frame of a video, in the layout's size."""
    if layout.clip is not None:
        return resize_frames(image, layout)
    return resize(image, layout.height, layout.width)


def build(checkpoint: Checkpoint, family: spec.QwenVL, weights: Weights) -> QwenVL:
    """Take the model's tensors from `weights`."""
    config = decoder_config(checkpoint.config, family.variant)
    tower_sizes = tower_config(checkpoint.config, family.variant)
    if tower_sizes.out != config.hidden_size:
        raise UserError(
            f"The image tower gives {tower_sizes.out} values a token, "
            f"the decoder takes {config.hidden_size}."
        )
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    check_token_ids(embedding, family.image_token_id)
    decoder = Decoder.take(weights, config, embedding)
    return QwenVL(family, decoder, embedding, QwenTower(weights, tower_sizes))
