"""Tensor names and shapes of DeepSeek's text decoders, for small checkpoints of tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.helpers.checkpoints import Shapes


def decoder_shapes(text: Mapping[str, Any], stem: str) -> Shapes:
    """Under `stem`.model and `stem`.lm_head, as the original repositories have them."""
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    shapes: Shapes = {
        f"{stem}model.embed_tokens.weight": (vocab, hidden),
        f"{stem}model.norm.weight": (hidden,),
        f"{stem}lm_head.weight": (vocab, hidden),
    }
    for i in range(text["num_hidden_layers"]):
        layer = f"{stem}model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        shapes |= _attention(text, f"{layer}.self_attn")
        if i < text["first_k_dense_replace"]:
            shapes |= _mlp(f"{layer}.mlp", hidden, text["intermediate_size"])
        else:
            shapes |= _mixture(text, f"{layer}.mlp")
    return shapes


def _attention(text: Mapping[str, Any], name: str) -> Shapes:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    if not text.get("qk_rope_head_dim"):
        return {f"{name}.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
    rank, rope = text["kv_lora_rank"], text["qk_rope_head_dim"]
    plain, value = text["qk_nope_head_dim"], text["v_head_dim"]
    return {
        f"{name}.q_proj.weight": (heads * (plain + rope), hidden),
        f"{name}.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        f"{name}.kv_a_layernorm.weight": (rank,),
        f"{name}.kv_b_proj.weight": (heads * (plain + value), rank),
        f"{name}.o_proj.weight": (hidden, heads * value),
    }


def _mixture(text: Mapping[str, Any], name: str) -> Shapes:
    hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
    shapes: Shapes = {f"{name}.gate.weight": (text["n_routed_experts"], hidden)}
    if text.get("topk_method") == "noaux_tc":
        shapes[f"{name}.gate.e_score_correction_bias"] = (text["n_routed_experts"],)
    for expert in range(text["n_routed_experts"]):
        shapes |= _mlp(f"{name}.experts.{expert}", hidden, inner)
    return shapes | _mlp(f"{name}.shared_experts", hidden, inner * text["n_shared_experts"])


def _mlp(name: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }
