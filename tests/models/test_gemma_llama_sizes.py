"""The hub's configs at their true size take exactly transformers' tensors; nothing is allocated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.families.gemma3 import model as gemma3
from pipeline.models.families.gemma3 import spec as gemma3_spec
from pipeline.models.families.mllama import model as mllama
from pipeline.models.families.mllama import spec as mllama_spec
from pipeline.models.loading import _renamed
from pipeline.settings import ModelSettings
from scripts.bench.random_weights import RandomWeights

PUBLISHED = Path(__file__).resolve().parents[2] / "scripts/bench/published"
NAMES = (
    "gemma-3-4b",
    "gemma-3-12b",
    "gemma-3-27b",
    "llama-3.2-11b-vision",
    "llama-3.2-90b-vision",
)


class Listed(RandomWeights):
    """Names and shapes alone, each of which must be among `names`."""

    def __init__(self, names: dict[str, torch.Size], rename: Any) -> None:
        super().__init__("meta", torch.bfloat16, tied=True)
        rules = [(re.compile(pattern), new) for pattern, new in rename]
        self.shapes = {_renamed(name, rules): shape for name, shape in names.items()}

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        assert tuple(self.shapes[name]) == tuple(shape), name
        return super().take(name, shape, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = json.loads((PUBLISHED / name / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config["model_type"], **plain)
        )
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    family = gemma3_spec if name.startswith("gemma") else mllama_spec
    module = gemma3 if name.startswith("gemma") else mllama
    weights = Listed(shapes, module.RENAME)
    assert family.matches(config)

    class Checkpoint:
        id, generation_config, preprocessor_config = "x", {"eos_token_id": 1}, {}

        def token_id(self, token: str) -> None:
            return None

    Checkpoint.config = config
    checkpoint: Any = Checkpoint()
    built = family.build(checkpoint, ModelSettings(id="x"))
    module.build(checkpoint, built, weights)
    left = set(weights.shapes) - weights.taken.keys() - {"lm_head.weight"}
    assert not left
    count = sum(shape.numel() for key, shape in shapes.items() if key != "lm_head.weight")
    count += 0 if name.startswith("gemma") else shapes["lm_head.weight"].numel()
    assert built.sizes.num_params == pytest.approx(count, rel=0.002)
    if name.startswith("gemma"):
        text, ours = theirs.config.text_config, gemma3.decoder_config(config)
        near = [kind == "sliding_attention" for kind in text.layer_types]
        assert ours.windows == tuple(1024 if n else None for n in near)
        assert ours.scale == text.query_pre_attn_scalar**-0.5
        assert ours.local_rope is not None
        thetas = [text.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding")]
        assert [ours.rope.theta, ours.local_rope.theta] == [t["rope_theta"] for t in thetas]
