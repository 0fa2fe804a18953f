"""The one decoder class computes what transformers' classes of other families compute.

Each case is a config and a transformers class with random weights: rotary kinds, windows, soft
caps, Gemma's norms, biases and query-key norms, all from `DecoderConfig` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.base import DenseAttend
from pipeline.models.decoder import Decoder, DecoderConfig, common_config, embed_tokens
from pipeline.models.loading import Weights
from pipeline.models.rope import RopeConfig, rope_config
from tests.helpers.parity import difference, random_text

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _gemma_layers(config: Any, text: dict[str, Any]) -> dict[str, Any]:
    kinds = config.layer_types
    windows = [text["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]
    return {
        "windows": tuple(windows),
        "norm_offset": 1.0,
        "post_norms": True,
        "act": "gelu_pytorch_tanh",
        "scale": text["query_pre_attn_scalar"] ** -0.5,
        "embed_scale": text["hidden_size"] ** 0.5,
        "tied": True,
    }


def _llama(scaling: dict[str, Any]) -> Any:
    def make() -> tuple[Any, DecoderConfig]:
        from transformers import LlamaConfig, LlamaForCausalLM

        options = SIZES | {"rope_parameters": scaling, "attention_bias": True, "mlp_bias": True}
        text = LlamaConfig(**options).to_dict()
        rope = rope_config(text, 16)
        ours = common_config(text, rope, qkv_bias=True, out_bias=True, mlp_bias=True)
        return LlamaForCausalLM(LlamaConfig(**options)), ours

    return make


def _mistral() -> tuple[Any, DecoderConfig]:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, sliding_window=7)
    text = config.to_dict()
    return MistralForCausalLM(config), common_config(text, rope_config(text, 16), windows=(7,) * 4)


def _qwen3() -> tuple[Any, DecoderConfig]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SIZES)
    text = config.to_dict()
    return Qwen3ForCausalLM(config), common_config(text, rope_config(text, 16), qk_norm=True)


def _gemma2() -> tuple[Any, DecoderConfig]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = SIZES | {
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }
    config = Gemma2Config(**options)
    differences = _gemma_layers(config, options) | {"softcap": 5.0, "logit_softcap": 3.0}
    text = config.to_dict()
    return Gemma2ForCausalLM(config), common_config(text, rope_config(text, 16), **differences)


def _gemma3() -> tuple[Any, DecoderConfig]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    options = SIZES | {"sliding_window": 6, "query_pre_attn_scalar": 24, "layer_types": kinds}
    options["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(**options)
    wide = rope_config({"rope_parameters": options["rope_parameters"]["full_attention"]}, 16)
    differences = _gemma_layers(config, options) | {
        "qk_norm": True,
        "local_rope": RopeConfig(theta=1e4, dim=16),
    }
    return Gemma3ForCausalLM(config), common_config(config.to_dict(), wide, **differences)


KINDS = {
    "llama, plain": _llama({"rope_type": "default", "rope_theta": 1e4}),
    "llama, llama3 scaling": _llama(LLAMA3),
    "llama, yarn": _llama(YARN),
    "llama, linear": _llama({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral, sliding window": _mistral,
    "qwen3, query and key norms": _qwen3,
    "gemma2, soft caps": _gemma2,
    "gemma3, two rotary kinds": _gemma3,
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_same_logits_as_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, config = KINDS[kind]()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3))
    theirs.eval().save_pretrained(tmp_path)
    weights = Weights([tmp_path / "model.safetensors"], "cpu", torch.float32)
    table = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    decoder = Decoder.take(weights, config, table)
    weights.finish()

    tokens = torch.tensor(random_text(120))
    x = embed_tokens(table, tokens, config.embed_scale)
    hidden = decoder(x, torch.arange(len(tokens))[None], DenseAttend(config))
    expected = theirs(tokens[None]).logits[0]
    assert difference(decoder.logits(hidden), expected) < 1e-4
