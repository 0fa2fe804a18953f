"""Writes small random Pixtral checkpoints: Mistral's own layout, and transformers' twin.

Both have the same model: Mistral's query and key rows stand in pairs that turn together, and its
names are other ones. For tests only.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipeline.vocabularies import tokenizer_text
from tests.helpers.checkpoints import Shapes, random_tensors, write_json
from tests.helpers.sentencepiece_model import CONTROL, LLAMA, model_bytes

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 56, 2, 4, 2, 16
WIDTH, TOWER_INNER, BLOCKS, TOWER_HEADS, PATCH, LONGEST = 32, 48, 2, 2, 4, 64
VOCABULARY = 384
WORDS = b" the, t,th,he,the, image,im,age, im, is, in, wh,at,.\n\n,\n\n, Des,cribe".split(b",")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The large one's control tokens, in the order of their ids.
LARGE = (
    *LLAMA,
    *((token, CONTROL) for token in ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")),
    ("[SYSTEM_PROMPT]", CONTROL),
    ("[/SYSTEM_PROMPT]", CONTROL),
)


def write_mistral(folder: Path, seed: int = 0, large: bool = False) -> Path:
    """Write params.json, consolidated.safetensors and tekken.json, or the large one's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = (5, 6, 7) if large else (10, 12, 13)
    write_json(folder / "params.json", _params(ids, bias=not large))
    tensors = random_tensors(_shapes(bias=not large), seed)
    save_file({_own_name(n): _woven(n, t) for n, t in tensors.items()}, _consolidated(folder))
    if large:
        (folder / "tokenizer.model.v7m1").write_bytes(model_bytes(LARGE))
    else:
        write_tekken(folder)
    return folder


def write_twin(folder: Path, seed: int = 0, large: bool = False) -> Path:
    """Write transformers' layout of the same model, with the names of its hub copies."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _twin_config(5 if large else 10, bias=not large))
    size = {"longest_edge": LONGEST}
    patch = {"height": PATCH, "width": PATCH}
    write_json(folder / "preprocessor_config.json", {"size": size, "patch_size": patch})
    made = folder / "made"
    made.mkdir(exist_ok=True)
    if large:
        (made / "tokenizer.model").write_bytes(model_bytes(LARGE))
    else:
        write_tekken(made)
    (folder / "tokenizer.json").write_text(tokenizer_text(made), "utf-8")
    tensors = random_tensors(_shapes(bias=not large), seed)
    save_file({_twin_name(n): t for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def write_tekken(folder: Path) -> None:
    ranked = [bytes([i]) for i in range(256)] + sorted(WORDS, key=len)
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for i, token in enumerate(ranked)
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 32,
        "default_num_special_tokens": 32,
        "version": "v3",
    }
    image = {"image_patch_size": PATCH, "max_image_size": LONGEST}
    file = {"config": config, "vocab": vocab, "multimodal": image}
    (folder / "tekken.json").write_text(json.dumps(file))


def _consolidated(folder: Path) -> Path:
    return folder / "consolidated.safetensors"


def _params(ids: tuple[int, int, int], bias: bool) -> dict[str, Any]:
    vision = {
        "hidden_size": WIDTH,
        "num_channels": 3,
        "image_size": LONGEST,
        "patch_size": PATCH,
        "rope_theta": 10000.0,
        "intermediate_size": TOWER_INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": TOWER_HEADS,
        "adapter_bias": bias,
        "image_token_id": ids[0],
        "image_break_token_id": ids[1],
        "image_end_token_id": ids[2],
    }
    return {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "hidden_dim": INNER,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "rope_theta": 1e9,
        "vision_encoder": vision,
    }


def _twin_config(image_id: int, bias: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": 1,
        "image_token_index": image_id,
        "multimodal_projector_bias": bias,
        "projector_hidden_act": "gelu",
        "text_config": {
            "head_dim": HEAD_DIM,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "max_position_embeddings": 4096,
            "model_type": "mistral",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e9,
            "sliding_window": None,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "head_dim": WIDTH // TOWER_HEADS,
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "image_size": LONGEST,
            "intermediate_size": TOWER_INNER,
            "model_type": "pixtral",
            "num_attention_heads": TOWER_HEADS,
            "num_hidden_layers": BLOCKS,
            "patch_size": PATCH,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _shapes(bias: bool) -> Shapes:
    """Names between the two layouts'."""
    shapes: Shapes = {
        "vision.patch_conv.weight": (WIDTH, 3, PATCH, PATCH),
        "vision.ln_pre.weight": (WIDTH,),
        "projector.in.weight": (HIDDEN, WIDTH),
        "projector.out.weight": (HIDDEN, HIDDEN),
        "text.tok_embeddings.weight": (VOCABULARY, HIDDEN),
        "text.norm.weight": (HIDDEN,),
        "text.output.weight": (VOCABULARY, HIDDEN),
    }
    if bias:
        shapes |= {"projector.in.bias": (HIDDEN,), "projector.out.bias": (HIDDEN,)}
    for i in range(BLOCKS):
        shapes |= _layer(f"vision.layers.{i}", WIDTH, TOWER_INNER, WIDTH, WIDTH)
    for i in range(LAYERS):
        wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes |= _layer(f"text.layers.{i}", HIDDEN, INNER, wide, narrow)
    return shapes


def _layer(name: str, size: int, inner: int, wide: int, narrow: int) -> Shapes:
    return {
        f"{name}.attention_norm.weight": (size,),
        f"{name}.ffn_norm.weight": (size,),
        f"{name}.attention.wq.weight": (wide, size),
        f"{name}.attention.wk.weight": (narrow, size),
        f"{name}.attention.wv.weight": (narrow, size),
        f"{name}.attention.wo.weight": (size, wide),
        f"{name}.feed_forward.w1.weight": (inner, size),
        f"{name}.feed_forward.w2.weight": (size, inner),
        f"{name}.feed_forward.w3.weight": (inner, size),
    }


def _own_name(name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind == "projector":
        return f"vision_language_adapter.w_{rest}"
    if kind == "text":
        return rest
    inside = rest.startswith("layers.")
    return f"vision_encoder.{'transformer.' if inside else ''}{rest}"


def _twin_name(name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind == "projector":
        number = {"in": "linear_1", "out": "linear_2"}
        part, _, end = rest.partition(".")
        return f"multi_modal_projector.{number[part]}.{end}"
    for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        rest = rest.replace(f"feed_forward.{old}", f"feed_forward.{new}")
    for part in "qkvo":
        rest = rest.replace(f"attention.w{part}.", f"attention.{part}_proj.")
    if kind == "vision":
        inside = rest.startswith("layers.")
        return f"vision_tower.{'transformer.' if inside else ''}{rest}"
    if rest == "output.weight":
        return "language_model.lm_head.weight"
    for old, new in (
        ("tok_embeddings", "embed_tokens"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        (".attention.", ".self_attn."),
        ("feed_forward", "mlp"),
    ):
        rest = rest.replace(old, new)
    return f"language_model.model.{rest}"


def _woven(name: str, tensor: np.ndarray) -> np.ndarray:
    """Query and key rows from halves to pairs, as Mistral keeps them."""
    if ".attention.wq." not in name and ".attention.wk." not in name:
        return tensor
    size = WIDTH // TOWER_HEADS if name.startswith("vision.") else HEAD_DIM
    halves = tensor.reshape(-1, 2, size // 2, tensor.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(tensor.shape)
