"""Writes small random Janus-Pro checkpoints, as the original repository has them or converted.

For tests only. The converted twin holds the same numbers under transformers' names, without the
parts that generate images. Imports neither torch (unless `.bin` is asked for) nor transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.checkpoints import (
    Shapes,
    linear,
    norm,
    random_tensors,
    write_json,
    write_weights,
)
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
    "<|User|>",
    "<|Assistant|>",
)
IDS = special_ids(SPECIAL)
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 3, 4, 2
WIDTH, DEPTH, TOWER_HEADS, SIDE, PATCH = 32, 2, 2, 48, 16
VOCAB = 64 * (max(IDS.values()) // 64 + 1)
GRID = SIDE // PATCH
LANGUAGE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}


def original_config() -> dict[str, Any]:
    """config.json as deepseek-ai/Janus-Pro-* have it, small."""
    projector = {"depth": 2, "input_dim": WIDTH, "n_embed": HIDDEN, "projector_type": "mlp_gelu"}
    vision = {
        "image_size": SIDE,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
        "width": WIDTH,
        "layers": DEPTH,
        "heads": TOWER_HEADS,
    }
    head = {"image_token_embed": HIDDEN, "image_token_size": 16384, "n_embed": HIDDEN}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": projector},
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": projector | {"input_dim": 8},
        },
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 16384, "n_embed": 8},
        },
        "language_config": LANGUAGE,
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": vision},
        "torch_dtype": "bfloat16",
    }


def converted_config() -> dict[str, Any]:
    """config.json as transformers writes it."""
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "image_token_id": IDS["<image_placeholder>"],
        "text_config": LANGUAGE,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": TOWER_HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "num_image_tokens": GRID**2,
            "projection_dim": HIDDEN,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "base_channels": 32,
            "channel_multiplier": [1],
            "latent_channels": 32,
            "num_embeddings": 16,
            "num_res_blocks": 1,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
    }


def original_shapes() -> Shapes:
    """Tensor names of the original layout; one of image generation's stands for all."""
    tower, model = "vision_model.vision_tower", "language_model.model"
    shapes: Shapes = {
        f"{tower}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{tower}.patch_embed.proj.bias": (WIDTH,),
        f"{tower}.pos_embed": (1, GRID**2, WIDTH),
        f"{tower}.attn_pool.latent": (1, 1, WIDTH),
        "gen_embed.weight": (16, 8),
        f"{model}.embed_tokens.weight": (VOCAB, HIDDEN),
        f"{model}.norm.weight": (HIDDEN,),
        "language_model.lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(DEPTH):
        block = f"{tower}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    shapes |= norm(f"{tower}.norm", WIDTH)
    shapes |= linear("aligner.layers.0", HIDDEN, WIDTH) | linear("aligner.layers.2", HIDDEN, HIDDEN)
    kv = KV_HEADS * HIDDEN // HEADS
    for i in range(LAYERS):
        layer = f"{model}.layers.{i}"
        for place in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{place}.weight"] = (HIDDEN,)
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (rows, HIDDEN)
        for part in ("gate", "up"):
            shapes[f"{layer}.mlp.{part}_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return shapes


_CONVERTED = (
    (r"^vision_model\.vision_tower\.patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^vision_model\.vision_tower\.pos_embed", "embeddings.position_embedding.weight"),
    (r"^vision_model\.vision_tower\.norm\.", "post_layernorm."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (
        r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj",
        r"encoder.layers.\1.self_attn.projection_layer",
    ),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn", r"encoder.layers.\1.self_attn"),
    (r"^vision_model\.vision_tower\.blocks\.", "encoder.layers."),
)


def converted(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under transformers' names."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.startswith("gen_") or "attn_pool" in name:
            continue
        if name.startswith("aligner"):
            new = name.replace("layers.0", "fc1").replace("layers.2", "hidden_layers.0")
            out[f"model.{new}"] = tensor
        elif name.startswith("language_model.lm_head"):
            out[name.removeprefix("language_model.")] = tensor
        elif name.startswith("language_model."):
            out[name.replace("language_model.model.", "model.language_model.")] = tensor
        else:
            out |= _converted_tower(name, tensor)
    return out


def _converted_tower(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    new = name
    for pattern, replacement in _CONVERTED:
        new, count = re.subn(pattern, replacement, name)
        if count:
            break
    new = f"model.vision_model.{new}"
    if ".qkv." in new:
        thirds = np.split(tensor, 3)
        return {
            new.replace(".qkv.", f".{part}_proj."): np.ascontiguousarray(third)
            for part, third in zip("qkv", thirds, strict=True)
        }
    return {new: tensor[0] if "position_embedding" in new else tensor}


def write_janus(
    folder: Path, twin: bool = False, pickled: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """Write the folder; `twin`: transformers' layout; `pickled`: two `.bin` files; `changes`: of
    config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(original_shapes(), seed)
    config = converted_config() if twin else original_config()
    write_json(folder / "config.json", config | changes)
    _write_processor(folder, twin)
    if twin:
        tensors = converted(tensors)
    if pickled:
        _write_pickled(folder, tensors)
    else:
        write_weights(folder, tensors)
    return folder


def _write_pickled(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    names = list(tensors)
    weight_map = {}
    for part in range(2):
        file = f"pytorch_model-{part + 1:05}-of-00002.bin"
        own = {name: torch.from_numpy(tensors[name]) for name in names[part::2]}
        torch.save(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)


def _write_processor(folder: Path, twin: bool) -> None:
    common = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}
    common |= {"do_normalize": True, "rescale_factor": 1 / 255}
    if twin:
        processor = common | {
            "image_processor_type": "JanusImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
        }
    else:
        processor = common | {
            "image_processor_type": "VLMImageProcessor",
            "image_size": SIDE,
            "processor_class": "VLChatProcessor",
            "background_color": [127, 127, 127],
        }
        write_json(
            folder / "processor_config.json",
            {
                "add_special_token": False,
                "ignore_id": -100,
                "image_tag": "<image_placeholder>",
                "mask_prompt": True,
                "num_image_tokens": GRID**2,
                "processor_class": "VLChatProcessor",
                "sft_format": "deepseek",
            },
        )
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "tokenizer.json").write_text(tokenizer_json(SPECIAL), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "pad_token": SPECIAL[2],
            "tokenizer_class": "LlamaTokenizer",
            "model_max_length": 2048,
        },
    )
