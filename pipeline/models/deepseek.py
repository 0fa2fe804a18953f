"""The decoder settings that the text configs of DeepSeek-V2 and V3 and their kin describe.

Latent attention or plain heads, mixtures of experts after the first layers. Knows no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.decoder import DecoderConfig, common_config
from pipeline.models.deepseek_sizes import has_latent
from pipeline.models.mla import MlaConfig, mla_scale
from pipeline.models.moe import moe_config
from pipeline.models.rope import rope_config


def mla_config(text: Mapping[str, Any]) -> MlaConfig | None:
    """None where the config says that heads are plain."""
    if not has_latent(text):
        return None
    return MlaConfig(
        plain=text["qk_nope_head_dim"],
        rope=text["qk_rope_head_dim"],
        value=text["v_head_dim"],
        rank=text["kv_lora_rank"],
        q_rank=text.get("q_lora_rank"),
    )


def deepseek_config(text: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """Read a text config whose missing keys are filled in already."""
    mla = mla_config(text)
    if mla is None:
        head_dim = text["hidden_size"] // text["num_attention_heads"]
        return common_config(text, rope_config(text, head_dim), moe=moe_config(text), **differences)
    rope = rope_config(text, mla.rope)
    values = {
        "head_dim": mla.row,
        "num_kv_heads": 1,
        "scale": mla_scale(mla, rope.scaling),
        "mla": mla,
        "moe": moe_config(text),
    }
    return common_config(text, rope, **(values | differences))
