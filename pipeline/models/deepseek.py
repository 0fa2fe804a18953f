"""The decoder settings that the text configs of DeepSeek-V2 and V3 and their kin describe.

Latent attention or plain heads, mixtures of experts after the first layers. Knows no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from pipeline.models.decoder import DecoderConfig, common_config
from pipeline.models.deepseek_sizes import has_latent
from pipeline.models.mla import MlaConfig, mla_scale
from pipeline.models.moe import moe_config
from pipeline.models.rope import RopeConfig, rope_config, yarn_growth

# What the original YaRN takes for a key that rope_scaling leaves out.
_YARN = {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.0}


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


def _rope(text: Mapping[str, Any], dim: int) -> RopeConfig:
    """Angles' size by the original's rule, which an `mscale_all_dim` of 0 does not switch off."""
    rope = rope_config(text, dim)
    if rope.kind != "yarn":
        return rope
    given = text.get("rope_scaling") or text["rope_parameters"]
    s = _YARN | {key: value for key, value in given.items() if value is not None}
    top, bottom = (yarn_growth(s["factor"], s[key]) for key in ("mscale", "mscale_all_dim"))
    return replace(rope, scaling=s | {"attention_factor": top / bottom, "truncate": True})


def deepseek_config(text: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """Read a text config whose missing keys are filled in already."""
    mla, bias = mla_config(text), bool(text.get("attention_bias", False))
    if mla is None:
        rope = rope_config(text, text["hidden_size"] // text["num_attention_heads"])
        plain = {"moe": moe_config(text), "qkv_bias": bias, "out_bias": bias}
        return common_config(text, rope, **(plain | differences))
    if bias:
        raise UserError("config.json: latent attention with attention_bias is not supported")
    rope = _rope(text, mla.rope)
    values = {
        "head_dim": mla.row,
        "num_kv_heads": 1,
        "scale": mla_scale(mla, rope.scaling),
        "mla": mla,
        "moe": moe_config(text),
    }
    return common_config(text, rope, **(values | differences))
