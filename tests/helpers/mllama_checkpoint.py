"""Writes a small random Llama 3.2 Vision as its hub repository has it: names, config, tokenizer.

For tests only. The image token's id is the head's size, as in the original, so the token table has
rows that the head lacks. Imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import (
    CLIP_MEAN,
    CLIP_STD,
    Shapes,
    random_tensors,
    write_json,
    write_weights,
)
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
IDS = special_ids(SPECIAL)
VOCAB = IDS["<|image|>"]
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 5, 4, 2
SIZE, TOWER_INNER, LOCAL, GLOBAL, TOWER_HEADS = 32, 52, 4, 2, 2
SIDE, PATCH, TILES, ARRANGEMENTS, KEPT = 56, 14, 4, 8, (0, 2)
LENGTH = (SIDE // PATCH) ** 2 + 1
CHAT_TEMPLATE = (
    "{% set ns = namespace(images=false, system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content.strip() %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
    "{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}{{ bos_token }}"
    "{% if not ns.images %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + ns.system }}"
    "<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% for part in m.content %}{{ '<|image|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _config(cross: tuple[int, ...]) -> dict[str, Any]:
    text = {
        "bos_token_id": IDS["<|begin_of_text|>"],
        "cross_attention_layers": list(cross),
        "eos_token_id": [IDS["<|end_of_text|>"], IDS["<|eom_id|>"], IDS["<|eot_id|>"]],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": IDS["<|finetune_right_pad_id|>"],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    vision = {
        "attention_heads": TOWER_HEADS,
        "hidden_act": "gelu",
        "hidden_size": SIZE,
        "image_size": SIDE,
        "intermediate_layers_indices": list(KEPT),
        "intermediate_size": TOWER_INNER,
        "max_num_tiles": TILES,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": GLOBAL,
        "num_hidden_layers": LOCAL,
        "patch_size": PATCH,
        "supported_aspect_ratios": [
            [1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1],
        ],
        "vision_output_dim": SIZE * (1 + len(KEPT)),
    }  # fmt: skip
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": IDS["<|image|>"],
        "model_type": "mllama",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }


def _decoder_shapes(cross: tuple[int, ...]) -> Shapes:
    stem, head_dim = "language_model.model", HIDDEN // HEADS
    shapes: Shapes = {
        f"{stem}.embed_tokens.weight": (VOCAB + 8, HIDDEN),
        f"{stem}.norm.weight": (HIDDEN,),
        "language_model.lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"{stem}.layers.{i}"
        attention = f"{layer}.cross_attn" if i in cross else f"{layer}.self_attn"
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{attention}.{part}_proj.weight"] = (heads * head_dim, HIDDEN)
        shapes[f"{attention}.o_proj.weight"] = (HIDDEN, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (HIDDEN,)
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        if i in cross:
            shapes |= {f"{attention}.{p}_norm.weight": (head_dim,) for p in "qk"}
            shapes |= {f"{layer}.cross_attn_{p}_gate": (1,) for p in ("attn", "mlp")}
    return shapes


def _tower_shapes() -> Shapes:
    stem, rows = "vision_model", ARRANGEMENTS + 1
    place = f"{stem}.gated_positional_embedding"
    shapes: Shapes = {
        f"{stem}.class_embedding": (SIZE,),
        f"{stem}.patch_embedding.weight": (SIZE, 3, PATCH, PATCH),
        f"{place}.embedding": (LENGTH, SIZE),
        f"{place}.gate": (1,),
        f"{place}.tile_embedding.weight": (rows, TILES * LENGTH * SIZE),
    }
    for part in ("pre", "post"):
        name = f"{stem}.{part}_tile_positional_embedding"
        shapes |= {f"{name}.embedding.weight": (rows, TILES * SIZE), f"{name}.gate": (1,)}
    norms = [f"{stem}.layernorm_pre", f"{stem}.layernorm_post"]
    for part, depth in (("transformer", LOCAL), ("global_transformer", GLOBAL)):
        for i in range(depth):
            layer = f"{stem}.{part}.layers.{i}"
            shapes |= {f"{layer}.self_attn.{p}_proj.weight": (SIZE, SIZE) for p in "qkvo"}
            shapes |= {f"{layer}.mlp.fc1.weight": (TOWER_INNER, SIZE)}
            shapes |= {f"{layer}.mlp.fc1.bias": (TOWER_INNER,)}
            shapes |= {f"{layer}.mlp.fc2.weight": (SIZE, TOWER_INNER)}
            shapes |= {f"{layer}.mlp.fc2.bias": (SIZE,)}
            norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
            if part == "global_transformer":
                shapes |= {f"{layer}.gate_{p}": (1,) for p in ("attn", "ffn")}
    return shapes | {f"{norm}.{part}": (SIZE,) for norm in norms for part in ("weight", "bias")}


def write_mllama(folder: Path, seed: int = 0, cross: tuple[int, ...] = (1, 3)) -> Path:
    """Write the checkpoint of meta-llama/Llama-3.2-*-Vision-Instruct, small; return its folder."""
    shapes = _decoder_shapes(cross) | _tower_shapes()
    shapes["multi_modal_projector.weight"] = (HIDDEN, SIZE * (1 + len(KEPT)))
    shapes["multi_modal_projector.bias"] = (HIDDEN,)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(cross)
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_processor_type": "MllamaImageProcessor",
            "image_std": CLIP_STD,
            "max_image_tiles": TILES,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": SIDE, "width": SIDE},
        },
    )
    stops = config["text_config"]["eos_token_id"]
    write_json(folder / "generation_config.json", {"eos_token_id": stops})
    (folder / "tokenizer.json").write_text(tokenizer_json(SPECIAL), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": 131072,
        },
    )
    write_weights(folder, random_tensors(shapes, seed))
    return folder
