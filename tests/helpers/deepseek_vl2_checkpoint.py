"""Writes small random DeepSeek-VL2 checkpoints of the three kinds, as the hub has them.

For tests only. A tile is 48 pixels a side and has 3 x 3 patches, so that the projector must pad.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import (
    Shapes,
    linear,
    norm,
    random_tensors,
    write_json,
    write_weights,
)
from tests.helpers.deepseek_shapes import decoder_shapes
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<image>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
)
IDS = special_ids(SPECIAL)
HIDDEN = 64
WIDTH, DEPTH, SIDE, PATCH = 32, 2, 48, 14
VOCAB = 64 * (max(IDS.values()) // 64 + 1)
CANDIDATES = [[SIDE * w, SIDE * h] for w in range(1, 10) for h in range(1, 10) if w * h <= 9]
_COMMON: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 40,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "tiny": _COMMON
    | {
        "topk_method": "greedy",
        "use_mla": False,
        "q_lora_rank": None,
        "kv_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "rm_head": False,
    },
    "small": _COMMON | _LATENT | {"topk_method": "greedy"},
    "base": _COMMON
    | _LATENT
    | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
}


def config_of(kind: str) -> dict[str, Any]:
    """config.json as deepseek-ai/deepseek-vl2* have it, small."""
    return {
        "candidate_resolutions": CANDIDATES,
        "global_view_pos": "head",
        "language_config": LANGUAGES[kind],
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "model_type": "mlp_projector",
            "input_dim": WIDTH,
            "n_embed": HIDDEN,
        },
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "image_size": SIDE,
            "layers": DEPTH,
            "heads": 2,
            "mlp_ratio": 3.7362,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": PATCH,
            "width": WIDTH,
        },
    }


def shapes_of(kind: str) -> Shapes:
    """Tensor names of the original layout, with two of the pooling head's that nobody uses."""
    inner, grid = int(WIDTH * 3.7362), SIDE // PATCH
    shapes: Shapes = {
        "vision.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision.patch_embed.proj.bias": (WIDTH,),
        "vision.pos_embed": (1, grid**2, WIDTH),
        "vision.attn_pool.latent": (1, 1, WIDTH),
        "vision.attn_pool.norm.weight": (WIDTH,),
        "image_newline": (HIDDEN,),
        "view_seperator": (HIDDEN,),
    }
    for i in range(DEPTH):
        block = f"vision.blocks.{i}"
        shapes |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", inner, WIDTH)
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, inner)
    shapes |= norm("vision.norm", WIDTH)
    shapes |= linear("projector.layers.0", HIDDEN, 4 * WIDTH)
    shapes |= linear("projector.layers.2", HIDDEN, HIDDEN)
    return shapes | decoder_shapes(LANGUAGES[kind], "language.")


def write_deepseek_vl2(
    folder: Path, kind: str, special: tuple[str, ...] = SPECIAL, **changes: Any
) -> Path:
    """Write the folder; `changes` are of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of(kind) | changes)
    write_weights(folder, random_tensors(shapes_of(kind), 0), files=2)
    write_json(
        folder / "processor_config.json",
        {
            "add_special_token": False,
            "candidate_resolutions": CANDIDATES,
            "downsample_ratio": 2,
            "ignore_id": -100,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "image_token": "<image>",
            "mask_prompt": False,
            "normalize": True,
            "pad_token": "<｜▁pad▁｜>",
            "patch_size": PATCH,
            "processor_class": "DeepseekVLV2Processor",
            "sft_format": "deepseek",
        },
    )
    (folder / "tokenizer.json").write_text(tokenizer_json(special), encoding="utf-8")
    names: dict[str, Any] = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    names |= {"pad_token": SPECIAL[2], "unk_token": None}
    write_json(
        folder / "tokenizer_config.json",
        names | {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 4096},
    )
    return folder
