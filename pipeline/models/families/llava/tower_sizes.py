"""The sizes of LLaVA's image towers, wherever a checkpoint's layout leaves them.

The original layout only names its tower; the table knows the usual names, the config.json of the
tower's own repository or folder tells the rest. Knows no projector and no tile. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.settings import ModelSettings


@dataclass(frozen=True)
class TowerSizes:
    """Sizes in values and pixels; `depth` blocks run of the `blocks` that there are."""

    kind: str  # clip | siglip
    blocks: int
    size: int
    heads: int
    inner: int
    patch: int
    side: int
    act: str
    eps: float
    depth: int = 0

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


_KNOWN = {
    "clip-vit-large-patch14-336": TowerSizes(
        "clip", 24, 1024, 16, 4096, 14, 336, "quick_gelu", 1e-5
    ),
    "clip-vit-large-patch14": TowerSizes("clip", 24, 1024, 16, 4096, 14, 224, "quick_gelu", 1e-5),
    "siglip-so400m-patch14-384": TowerSizes(
        "siglip", 27, 1152, 16, 4304, 14, 384, "gelu_pytorch_tanh", 1e-6
    ),
}
# What transformers' classes take for a key that a config leaves out.
_DEFAULTS = {
    "clip": TowerSizes("clip", 12, 768, 12, 3072, 32, 224, "quick_gelu", 1e-5),
    "siglip": TowerSizes("siglip", 12, 768, 12, 3072, 16, 224, "gelu_pytorch_tanh", 1e-6),
}
_KEYS = {
    "blocks": "num_hidden_layers",
    "size": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "patch": "patch_size",
    "side": "image_size",
    "act": "hidden_act",
    "eps": "layer_norm_eps",
}


def converted_tower(vision: Mapping[str, Any] | None, layer: Any, onevision: bool) -> TowerSizes:
    """The tower of transformers' layout, up to the hidden state `layer`.

    A config without a `vision_config` means the sizes that the class writes out for it; one that
    only lacks keys means the tower class's own.
    """
    if vision is None:
        sizes = _KNOWN["siglip-so400m-patch14-384" if onevision else "clip-vit-large-patch14-336"]
        return _cut(replace(sizes, blocks=26) if onevision else sizes, layer)
    kind = "siglip_vision_model" if onevision else "clip_vision_model"
    return _cut(_from_config({"model_type": kind} | dict(vision)), layer)


def original_tower(checkpoint: Checkpoint) -> TowerSizes:
    """The tower that the original layout names in `mm_vision_tower`."""
    config = checkpoint.config
    name = str(config["mm_vision_tower"])
    sizes = _KNOWN.get(Path(name).name)
    if sizes is None:
        own = stock_tower(checkpoint).config
        sizes = _from_config({**own, **(own.get("vision_config") or {})})
    # NOTE: the original code throws SigLIP's last block away and takes what is left.
    layer = -2 if sizes.kind == "siglip" else config.get("mm_vision_select_layer", -2)
    return _cut(sizes, layer)


def stock_tower(checkpoint: Checkpoint) -> Checkpoint:
    """The tower's own checkpoint, for a checkpoint that has only the rest. May fetch it."""
    name = str(checkpoint.config["mm_vision_tower"])
    folder = checkpoint.folder / name
    return Checkpoint.open(ModelSettings(id=str(folder) if folder.is_dir() else name))


def _from_config(vision: Mapping[str, Any]) -> TowerSizes:
    model_type = str(vision.get("model_type", "clip_vision_model"))
    kind = next((kind for kind in _DEFAULTS if model_type.startswith(kind)), None)
    if kind is None or model_type.startswith("siglip2"):
        raise UserError(f"The image tower {model_type!r} is none that LLaVA is known with.")
    defaults: Any = _DEFAULTS[kind]
    given = {
        ours: type(getattr(defaults, ours))(vision[key])
        for ours, key in _KEYS.items()
        if vision.get(key) is not None
    }
    return replace(_DEFAULTS[kind], **given)


def _cut(sizes: TowerSizes, layer: Any) -> TowerSizes:
    """The hidden state `layer`, counted as transformers does: 0 is what enters the first block."""
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or not -sizes.blocks - 1 <= layer <= sizes.blocks:
        raise UserError(f"The image tower's layer {layer!r} is not supported; write one number.")
    return replace(sizes, depth=layer if layer >= 0 else sizes.blocks + 1 + layer)
