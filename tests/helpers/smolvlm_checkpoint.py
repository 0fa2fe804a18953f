"""Writes small random SmolVLM2 checkpoints in the hub's layout, for tests only.

The same seed gives the same bytes. Imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.templates.smolvlm import TEMPLATE
from tests.helpers.checkpoints import Shapes, random_tensors, write_json, write_weights
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, TOWER, TOWER_INNER = 48, 80, 2, 3, 1, 32, 52
SPECIAL = ("<|endoftext|>", *TEMPLATE.control)
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_smolvlm(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    """Write a SmolVLM2 of tiles of 56 pixels, four tokens each."""
    ids = special_ids(SPECIAL)
    vocabulary = 64 * (max(ids.values()) // 64 + 1)
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": ids["<image>"],
        "model_type": "smolvlm",
        "scale_factor": 2,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "head_dim": 16,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "vocab_size": vocabulary,
        },
        "tie_word_embeddings": tied,
        "vision_config": {
            "hidden_size": TOWER,
            "image_size": 56,
            "intermediate_size": TOWER_INNER,
            "model_type": "smolvlm_vision",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
    }
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_image_splitting": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 56},
        "resample": 1,
        "size": {"longest_edge": 224},
    }
    stop = ids["<end_of_utterance>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": 2})
    (folder / "tokenizer.json").write_text(tokenizer_json(SPECIAL), encoding="utf-8")
    write_weights(folder, random_tensors(_shapes(vocabulary, tied), seed))
    return folder


def _shapes(vocabulary: int, tied: bool) -> Shapes:
    text, tower = "model.text_model", "model.vision_model"
    shapes: Shapes = {
        f"{text}.embed_tokens.weight": (vocabulary, HIDDEN),
        f"{text}.norm.weight": (HIDDEN,),
        "model.connector.modality_projection.proj.weight": (HIDDEN, 4 * TOWER),
        f"{tower}.embeddings.patch_embedding.weight": (TOWER, 3, 14, 14),
        f"{tower}.embeddings.patch_embedding.bias": (TOWER,),
        f"{tower}.embeddings.position_embedding.weight": (16, TOWER),
        f"{tower}.post_layernorm.weight": (TOWER,),
        f"{tower}.post_layernorm.bias": (TOWER,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    for i in range(2):
        shapes |= _tower_layer(f"{tower}.encoder.layers.{i}")
    for i in range(LAYERS):
        shapes |= _text_layer(f"{text}.layers.{i}")
    return shapes


def _tower_layer(name: str) -> Shapes:
    sizes = {f"self_attn.{part}_proj": (TOWER, TOWER) for part in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (TOWER_INNER, TOWER), "mlp.fc2": (TOWER, TOWER_INNER)}
    shapes: Shapes = {f"{name}.{part}.weight": size for part, size in sizes.items()}
    shapes |= {f"{name}.{part}.bias": size[:1] for part, size in sizes.items()}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{name}.{norm}.weight": (TOWER,), f"{name}.{norm}.bias": (TOWER,)}
    return shapes


def _text_layer(name: str) -> Shapes:
    sizes = {
        "self_attn.q_proj": (HEADS * 16, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * 16, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * 16, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * 16),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    shapes: Shapes = {f"{name}.{part}.weight": size for part, size in sizes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{name}.{norm}.weight"] = (HIDDEN,)
    return shapes
