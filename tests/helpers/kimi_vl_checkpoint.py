"""Writes small random Kimi-VL checkpoints as the hub has them, tiktoken.model included.

For tests only. The config leaves out what the original leaves out. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.vocabularies.byte_level import byte_spelling
from tests.helpers.checkpoints import (
    Shapes,
    linear,
    norm,
    random_tensors,
    write_json,
    write_weights,
)
from tests.helpers.deepseek_shapes import decoder_shapes
from tests.helpers.tiny_tokenizer import tokenizer_json

# Offsets from the first reserved id, as the real tokenizer has them.
SPECIAL = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 9: "[EOT]",
    10: "<|im_system|>", 17: "<|im_middle|>", 18: "<|media_start|>", 19: "<|media_content|>",
    20: "<|media_end|>", 21: "<|media_pad|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
WORDS = ("东", "京", "东京", "'s", "HTTP", "naïve", "12", "123", "  ", "\n\n")
HIDDEN, WIDTH, DEPTH, PATCH, TABLE = 64, 48, 2, 14, (6, 6)


@lru_cache(1)
def ranked() -> tuple[bytes, ...]:
    """Tokens by rank: bytes, the tiny tokenizer's merges, and words that test the cutting."""
    bytes_of = {char: byte for byte, char in byte_spelling().items()}
    merges = json.loads(tokenizer_json())["model"]["merges"]
    joined = [bytes(bytes_of[c] for c in merge.replace(" ", "")) for merge in merges]
    words = [word.encode()[:cut] for word in WORDS for cut in range(2, len(word.encode()) + 1)]
    return tuple(dict.fromkeys([*(bytes([i]) for i in range(256)), *joined, *words]))


FIRST = len(ranked())
IDS = {name: FIRST + offset for offset, name in SPECIAL.items()}
TEXT: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 40,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 800000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 12,
    "vocab_size": FIRST + 256,
}
VISION: dict[str, Any] = {
    "model_type": "moonvit",
    "patch_size": PATCH,
    "num_attention_heads": 4,
    "num_hidden_layers": DEPTH,
    "hidden_size": WIDTH,
    "intermediate_size": 84,
    "merge_kernel_size": [2, 2],
    "init_pos_emb_height": TABLE[0],
    "init_pos_emb_width": TABLE[1],
}
MAX_PATCHES = 64


def config_of() -> dict[str, Any]:
    """config.json as moonshotai/Kimi-VL-A3B-Instruct has it, small."""
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "ignore_index": -100,
        "media_placeholder_token_id": IDS["<|media_pad|>"],
        "model_type": "kimi_vl",
        "pad_token_id": IDS["[PAD]"],
        "text_config": TEXT,
        "torch_dtype": "bfloat16",
        "vision_config": VISION,
        "vocab_size": TEXT["vocab_size"],
    }


def shapes_of() -> Shapes:
    """Tensor names of the original layout."""
    tower, projector = "vision_tower", "multi_modal_projector"
    shapes: Shapes = {
        f"{tower}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{tower}.patch_embed.proj.bias": (WIDTH,),
        f"{tower}.patch_embed.pos_emb.weight": (*TABLE, WIDTH),
    }
    for i in range(DEPTH):
        block = f"{tower}.encoder.blocks.{i}"
        shapes |= norm(f"{block}.norm0", WIDTH) | norm(f"{block}.norm1", WIDTH)
        shapes |= linear(f"{block}.wqkv", 3 * WIDTH, WIDTH) | linear(f"{block}.wo", WIDTH, WIDTH)
        inner = VISION["intermediate_size"]
        shapes |= linear(f"{block}.mlp.fc0", inner, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", WIDTH, inner)
    shapes |= norm(f"{tower}.encoder.final_layernorm", WIDTH)
    shapes |= norm(f"{projector}.pre_norm", WIDTH)
    shapes |= linear(f"{projector}.linear_1", 4 * WIDTH, 4 * WIDTH)
    shapes |= linear(f"{projector}.linear_2", HIDDEN, 4 * WIDTH)
    return shapes | decoder_shapes(TEXT, "language_model.")


def tensors_of() -> dict[str, Any]:
    """The checkpoint's values; the position table's are as large as the patches'."""
    tensors = random_tensors(shapes_of(), 0)
    tensors["vision_tower.patch_embed.pos_emb.weight"] *= 5.0
    return tensors


def write_kimi_vl(folder: Path, **changes: Any) -> Path:
    """Write the folder; `changes` are of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of() | changes)
    write_weights(folder, tensors_of(), files=2)
    write_json(
        folder / "preprocessor_config.json",
        {
            "in_token_limit": MAX_PATCHES,
            "patch_size": PATCH,
            "num_pooled_tokens": 1024,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "pad_input": True,
            "image_processor_type": "KimiVLImageProcessor",
        },
    )
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": IDS["[EOS]"], "pad_token_id": IDS["[PAD]"]},
    )
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranked())]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    named = {str(IDS[name]): {"content": name, "special": True} for name in SPECIAL.values()}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": named,
            "bos_token": "[BOS]",
            "eos_token": "[EOS]",
            "tokenizer_class": "TikTokenTokenizer",
        },
    )
    return folder
