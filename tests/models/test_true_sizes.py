"""Families built at the sizes of their published checkpoints, without memory for a single weight.

Every tensor is asked for once, and together they are as many values as the hub counts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loading import Weights
from pipeline.settings import ModelSettings
from tests.helpers.minicpm_checkpoint import write_minicpm_o, write_minicpm_v
from tests.helpers.smolvlm_checkpoint import write_smolvlm

SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SIGLIP |= {"num_attention_heads": 16, "patch_size": 14}
QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN2_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4}
MINICPM = QWEN2_7B | {"query_num": 64, "vision_config": SIGLIP | {"image_size": 980}}
SMOLLM2 = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
SMOLLM2 |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64}
CASES = {
    "minicpm": (write_minicpm_v, MINICPM | {"vocab_size": 151_666}, 8_099_175_152),
    "minicpm_o": (
        write_minicpm_o,
        MINICPM | {"vocab_size": 151_700, "audio_config": {}},
        8_423_157_488,  # without the speech synthesis
    ),
    "smolvlm": (
        write_smolvlm,
        {
            "text_config": SMOLLM2 | {"vocab_size": 49_280, "rms_norm_eps": 1e-5},
            "vision_config": SIGLIP | {"image_size": 384},
            "scale_factor": 3,
        },
        2_246_784_880,
    ),
}


class ShapesOnly(Weights):
    """Hands out tensors without storage, and keeps what was asked for."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("meta"), torch.bfloat16
        self.taken: dict[str, tuple[int, ...]] = {}
        self._places, self._used = {}, set()

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        assert name not in self.taken, name
        self.taken[name] = tuple(shape)
        return torch.empty(tuple(shape), device="meta", dtype=dtype or self.dtype)


@pytest.mark.parametrize("family", CASES)
def test_published_sizes(family: str, tmp_path: Path) -> None:
    write: Callable[[Path], Path]
    write, sizes, count = CASES[family]
    path = write(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    settings = ModelSettings(id=str(tmp_path))
    checkpoint = Checkpoint.open(settings)
    module = f"pipeline.models.families.{family}"
    described: Any = importlib.import_module(f"{module}.spec").build(checkpoint, settings)
    weights = ShapesOnly()
    importlib.import_module(f"{module}.model").build(checkpoint, described, weights)
    assert sum(prod(shape) for shape in weights.taken.values()) == count
    assert described.sizes.num_params == pytest.approx(count, rel=0.005)
