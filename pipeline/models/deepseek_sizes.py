"""What the cost estimate needs to know of a DeepSeek text config: parameters, cache.

Knows no tower. Imports no torch; the decoder's side is `deepseek.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_sizes(text: Mapping[str, Any]) -> dict[str, int]:
    """The decoder's fields of `ModelSizes`."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    heads, latent = text["num_attention_heads"], has_latent(text)
    head_dim = hidden // heads
    if latent:
        head_dim = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
    attention = _latent_params(text) if latent else _plain_params(text)
    mixtures = sum(_is_mixture(text, i) for i in range(layers))
    mlp = 3 * hidden * text["intermediate_size"] * (layers - mixtures)
    expert = 3 * hidden * (text.get("moe_intermediate_size") or 0)
    shared = text.get("n_shared_experts") or 0
    all_experts, some = (text.get("n_routed_experts") or 0), (text.get("num_experts_per_tok") or 0)
    fixed = layers * attention + mlp + mixtures * hidden * all_experts
    row = text["kv_lora_rank"] + text["qk_rope_head_dim"] if latent else 0
    return {
        "num_layers": layers,
        "num_kv_heads": 1 if latent else text.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "num_heads": heads,
        "decoder_params": fixed + mixtures * expert * (shared + all_experts),
        "active_params": fixed + mixtures * expert * (shared + some),
        "embedding_params": 2 * hidden * text["vocab_size"],
        "latent_values": row,
    }


def has_latent(text: Mapping[str, Any]) -> bool:
    """False where the config says that heads are plain."""
    return bool(text.get("use_mla", True) and text.get("qk_rope_head_dim"))


def _is_mixture(text: Mapping[str, Any], layer: int) -> bool:
    if not text.get("n_routed_experts"):
        return False
    return layer >= text.get("first_k_dense_replace", 0) and (
        layer % text.get("moe_layer_freq", 1) == 0
    )


def _plain_params(text: Mapping[str, Any]) -> int:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    return 2 * hidden * (hidden + hidden // heads * kv_heads)


def _latent_params(text: Mapping[str, Any]) -> int:
    hidden, heads, rank = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]
    plain, rope, value = (text[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, wide = text.get("q_lora_rank"), heads * (plain + rope)
    query = hidden * wide if q_rank is None else q_rank * (hidden + wide)
    row = hidden * (rank + rope)
    return query + row + rank * heads * (plain + value) + heads * value * hidden
