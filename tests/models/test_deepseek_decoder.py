"""Latent attention and mixtures of experts compute what transformers' DeepSeek classes compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.base import DenseAttend
from pipeline.models.decoder import Decoder, embed_tokens
from pipeline.models.deepseek import deepseek_config
from pipeline.models.loading import Weights
from pipeline.models.moe import MoeConfig, moe_config, route
from pipeline.models.rope import Rope
from tests.helpers.parity import difference, random_text

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}


def _v2(**options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(**SIZES, **options)
    return DeepseekV2ForCausalLM(config), config.to_dict()


def _v3(**options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    common = {"n_group": 1, "topk_group": 1, "num_mtp_layers": 0, "routed_scaling_factor": 2.446}
    config = DeepseekV3Config(**(SIZES | common | options))
    text = config.to_dict() | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return DeepseekV3ForCausalLM(config), text


KINDS = {
    "softmax, not normalised": lambda: _v2(),
    "softmax, groups": lambda: _v2(topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "sigmoid with correction": lambda: _v3(rope_theta=800000.0),
    "sigmoid, groups": lambda: _v3(n_group=4, topk_group=2),
    "query latent": lambda: _v3(q_lora_rank=20),
    "stretched context": lambda: _v3(rope_parameters=YARN),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_same_logits_as_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, text = KINDS[kind]()
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if "inv_freq" not in name:
            tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.dim() > 1 else 0.3))
    theirs.eval().save_pretrained(tmp_path)
    config = deepseek_config(text)
    weights = Weights([tmp_path / "model.safetensors"], "cpu", torch.float32)
    table = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    decoder = Decoder.take(weights, config, table)
    weights.finish()
    tokens = torch.tensor(random_text(90))
    x = embed_tokens(table, tokens, None)
    attend = DenseAttend(config)
    some = torch.arange(60)
    first = decoder(x[:60], some[None], attend)
    rest = decoder(x[60:], torch.arange(60, 90)[None], attend, torch.tensor([3, 29]))
    logits = decoder.logits(torch.cat([first, rest]))
    expected = theirs(tokens[None]).logits[0][[*range(60), 63, 89]]
    assert difference(logits, expected) < 1e-4


def test_weights_of_chosen_experts_are_the_unbiased_scores() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    bias = torch.linspace(-3, 3, 8)
    c = MoeConfig(8, 3, 4, sigmoid=True, correction=True, normalised=True, scaling=2.0)
    chosen, by = route(x, weight, bias, c)
    scores, chosen = (x @ weight.T).sigmoid(), chosen.long()
    assert torch.equal(chosen.sort().values, (scores + bias).topk(3).indices.sort().values)
    picked = scores.gather(1, chosen)
    torch.testing.assert_close(by, 2 * picked / picked.sum(1, keepdim=True))


@pytest.mark.parametrize(("key", "value"), [("topk_method", "gready"), ("scoring_func", "tanh")])
def test_unknown_ways_of_routing_are_refused(key: str, value: str) -> None:
    text = {"n_routed_experts": 4, "moe_intermediate_size": 4, "num_experts_per_tok": 2, key: value}
    with pytest.raises(UserError, match=value):
        moe_config(text)


@torch.inference_mode()
def test_float8_experts_are_near_the_others(tmp_path: Path) -> None:
    from pipeline.kernels.fp8 import FP8
    from pipeline.models.families.deepseek_vl2 import spec
    from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
    from tests.helpers.parity import make_prompt, open_ours, our_logits

    folder = write_deepseek_vl2(tmp_path, "base")
    model = open_ours(folder, spec.build)
    prompt = make_prompt(model.family, [random_text(60)])
    before = our_logits(model, prompt)
    model = open_ours(folder, spec.build, quantization="fp8")
    mixture = model.decoder.layers[1].mlp
    assert mixture.experts.down.dtype == FP8
    assert mixture.mlp.down.weight.dtype == FP8
    after = our_logits(model, prompt)
    assert difference(after, before) > 1e-4
    alike = torch.nn.functional.cosine_similarity(before, after)
    assert alike.median() > 0.97


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"mscale": 0.5}, 0.05 * math.log(4) + 1),
        ({"mscale": 0.5, "mscale_all_dim": 0}, 0.05 * math.log(4) + 1),
        ({"mscale_all_dim": 0.7}, (0.1 * math.log(4) + 1) / (0.07 * math.log(4) + 1)),
        ({}, 0.1 * math.log(4) + 1),
    ],
)
def test_what_a_stretched_context_leaves_out(given: dict[str, float], size: float) -> None:
    """The original's defaults, which differ from those of transformers."""
    scaling = {"type": "yarn", "factor": 4.0} | given
    config = deepseek_config(SIZES | {"rope_scaling": scaling, "rope_theta": 1e4})
    assert Rope(config.rope, "cpu").size == pytest.approx(size)
    assert config.rope.scaling["original_max_position_embeddings"] == 4096


def test_biases_of_attention() -> None:
    """Plain heads may have them; rows of latent attention are not known to."""
    biased = SIZES | {"attention_bias": True}
    config = deepseek_config(biased | {"use_mla": False})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, True, False)
    with pytest.raises(UserError, match="attention_bias"):
        deepseek_config(biased)
