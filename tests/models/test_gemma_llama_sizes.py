"""The hub's configs at their true size take exactly transformers' tensors; nothing is allocated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.models.families.gemma3 import model as gemma3
from pipeline.models.families.gemma3 import spec as gemma3_spec
from pipeline.models.families.mllama import model as mllama
from pipeline.models.families.mllama import spec as mllama_spec
from pipeline.models.loading import Weights, _renamed

SIGLIP = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
LLAMA_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def gemma(**text: Any) -> dict[str, Any]:
    """config.json as google/gemma-3-*-it have it: what is the class's default is left out."""
    common = {
        "model_type": "gemma3_text",
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": common | text,
        "vision_config": SIGLIP,
    }


def llama(hidden: int, inner: int, layers: int, heads: int, cross: Sequence[int]) -> dict[str, Any]:
    text = {
        "cross_attention_layers": list(cross),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "model_type": "mllama_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rope_scaling": LLAMA_ROPE,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    vision = {"image_size": 560, "model_type": "mllama_vision_model", "max_num_tiles": 4}
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": text,
        "vision_config": vision,
    }


CONFIGS = {
    "gemma-3-4b": gemma(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "gemma-3-12b": gemma(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
        num_attention_heads=16, num_key_value_heads=8,
    ),
    "gemma-3-27b": gemma(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
        num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168,
    ),
    "llama-3.2-11b": llama(4096, 14336, 40, 32, range(3, 40, 5)),
    "llama-3.2-90b": llama(8192, 28672, 100, 64, range(3, 100, 5)),
}  # fmt: skip
PARAMS = {
    "gemma-3-4b": 4.3, "gemma-3-12b": 12.2, "gemma-3-27b": 27.4, "llama-3.2-11b": 10.7,
    "llama-3.2-90b": 88.6,
}  # fmt: skip


class Listed(Weights):
    """Tensors on no device: names and shapes alone."""

    def __init__(self, names: dict[str, torch.Size], rename: Any) -> None:
        self.device, self.dtype = torch.device("meta"), torch.bfloat16
        rules = [(re.compile(pattern), new) for pattern, new in rename]
        self.shapes = {_renamed(name, rules): shape for name, shape in names.items()}
        self.taken: set[str] = set()

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        assert tuple(self.shapes[name]) == tuple(shape), name
        self.taken.add(name)
        return torch.empty(tuple(shape), dtype=dtype or self.dtype, device="meta")

    def drop(self, name: str) -> None:
        self.taken.add(name)

    def drop_all(self, prefix: str) -> bool:
        return False


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = CONFIGS[name]
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
    settings: Any = None
    built = family.build(Checkpoint(), settings)
    module.build(Checkpoint(), built, weights)
    left = set(weights.shapes) - weights.taken - {"lm_head.weight"}
    assert not left
    count = sum(shape.numel() for key, shape in shapes.items() if key != "lm_head.weight")
    count += 0 if name.startswith("gemma") else shapes["lm_head.weight"].numel()
    assert built.sizes.num_params == pytest.approx(count, rel=0.01)
    if name.startswith("gemma"):
        text, ours = theirs.config.text_config, gemma3.decoder_config(config)
        near = [kind == "sliding_attention" for kind in text.layer_types]
        assert ours.windows == tuple(1024 if n else None for n in near)
        assert ours.scale == text.query_pre_attn_scalar**-0.5
        assert ours.local_rope is not None
        thetas = [text.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding")]
        assert [ours.rope.theta, ours.local_rope.theta] == [t["rope_theta"] for t in thetas]
    assert count / 1e9 == pytest.approx(PARAMS[name], abs=0.1)
