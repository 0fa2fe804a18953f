"""LLaVA and Pixtral built at the sizes of their published checkpoints, without a single weight.

Counts are the whole checkpoints', less what is never used: CLIP's last block, last norms.
"""

from __future__ import annotations

import importlib
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.settings import ModelSettings
from tests.helpers.llava_checkpoint import write_tokenizer
from tests.helpers.pixtral_checkpoint import write_tekken
from tests.models.test_true_sizes import ShapesOnly

CLIP_UNUSED = 12_596_224 + 2048
SIGLIP_UNUSED = 2304
LLAVA = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "tie_word_embeddings": False,
}
TILED = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
LLAVA_15_7B = LLAVA | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "pad",
    "vocab_size": 32064,  # the hub's copy, whose vocabulary is padded
}
LLAVA_15_13B = LLAVA_15_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}
NEXT_72B = (
    LLAVA
    | TILED
    | {
        "architectures": ["LlavaQwenForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 152_064,
    }
)
ONEVISION_7B = (
    LLAVA
    | TILED
    | {
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": 1152,
        "image_aspect_ratio": "anyres_max_9",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    }
)
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
VISION |= {"num_attention_heads": 16, "image_size": 1024, "patch_size": 16}
PIXTRAL_12B = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 131_072,
    "rope_theta": 1e9,
    "vision_encoder": VISION,
}
LARGE_VISION = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40}
PIXTRAL_LARGE = PIXTRAL_12B | {
    "dim": 12288,
    "n_layers": 88,
    "hidden_dim": 28672,
    "n_heads": 96,
    "vocab_size": 32768,
    "vision_encoder": VISION | LARGE_VISION | {"adapter_bias": False},
}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "llava-1.5-7b": (LLAVA_15_7B, 7_063_427_072 - CLIP_UNUSED),
    "llava-1.5-13b": (LLAVA_15_13B, 13_350_839_296 - CLIP_UNUSED),
    "llava-next-72b": (NEXT_72B, 72_666_949_632 - CLIP_UNUSED),
    "llava-onevision-7b": (ONEVISION_7B, 8_030_348_832 - SIGLIP_UNUSED),
    "pixtral-12b": (PIXTRAL_12B, 12_682_739_712),
    "pixtral-large": (PIXTRAL_LARGE, 124_134_845_824),
}


class TowerInside(ShapesOnly):
    """A checkpoint that has every tensor that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._changes = []

    def has(self, name: str) -> bool:
        return True


@pytest.mark.parametrize("name", CASES)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    config, count = CASES[name]
    pixtral = name.startswith("pixtral")
    (tmp_path / ("params.json" if pixtral else "config.json")).write_text(json.dumps(config))
    if pixtral:
        write_tekken(tmp_path)
    else:
        write_tokenizer(tmp_path, "onevision" if "Qwen" in str(config) else "1.5")
    settings = ModelSettings(id=str(tmp_path))
    checkpoint = Checkpoint.open(settings)
    family = family_for(checkpoint, settings)
    package = type(family).__module__.rpartition(".")[0]
    weights = TowerInside()
    importlib.import_module(f"{package}.model").build(checkpoint, family, weights)
    assert sum(prod(shape) for shape in weights.taken.values()) == count
    assert family.sizes.num_params == pytest.approx(count, rel=0.005)
