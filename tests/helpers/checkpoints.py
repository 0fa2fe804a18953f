"""Writes small random checkpoints in the layout that the hub has them, tokenizer included.

For tests only: config.json as the original repositories write it (flat for Qwen2-VL and
Qwen2.5-VL, nested for Qwen3-VL), original tensor names, a byte-level BPE tokenizer.json. The same
seed gives the same bytes. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers.tiny_tokenizer import CHAT_TEMPLATE, special_ids, tokenizer_json

Shapes = dict[str, tuple[int, ...]]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 3, 4, 2
TOWER_SIZE, TOWER_HEADS, TOWER_DEPTH = 32, 2, 4
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def write_qwen2_vl(folder: Path, **options: Any) -> Path:
    """Write a Qwen2-VL: LayerNorm and quick GELU in the tower, full attention."""
    vision = {
        "depth": TOWER_DEPTH,
        "embed_dim": TOWER_SIZE,
        "hidden_size": HIDDEN,
        "mlp_ratio": 4,
        "num_heads": TOWER_HEADS,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    config = _flat_config("qwen2_vl", "Qwen2VLForConditionalGeneration", vision)
    return _write(folder, config, _tower_shapes(config), "", **options)


def write_qwen2_5_vl(folder: Path, **options: Any) -> Path:
    """Write a Qwen2.5-VL: RMSNorm and gated MLP in the tower, windows but in every second block."""
    vision = {
        "depth": TOWER_DEPTH,
        "hidden_act": "silu",
        "hidden_size": TOWER_SIZE,
        "intermediate_size": 84,
        "num_heads": TOWER_HEADS,
        "in_chans": 3,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    config = _flat_config("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", vision)
    return _write(folder, config, _tower_shapes(config), "", **options)


def write_qwen3_vl(folder: Path, **options: Any) -> Path:
    """Write a Qwen3-VL: QK norm, interleaved M-RoPE, deepstack, learned position table."""
    vision = {
        "depth": TOWER_DEPTH,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": TOWER_SIZE,
        "in_channels": 3,
        "intermediate_size": 84,
        "model_type": "qwen3_vl",
        "num_heads": TOWER_HEADS,
        "num_position_embeddings": 49,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0, 2],
    }
    text = _text_config() | {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "head_dim": 24,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [4, 4, 4],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        **_token_ids(),
    }
    return _write(folder, config, _tower_shapes(config), "model.", **options)


WRITERS = {
    "qwen2_vl": write_qwen2_vl,
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
}


def _token_ids() -> dict[str, int]:
    ids = special_ids()
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _text_config() -> dict[str, Any]:
    ids = special_ids()
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "vocab_size": 64 * (max(ids.values()) // 64 + 1),
    }


def _flat_config(model_type: str, architecture: str, vision: dict[str, Any]) -> dict[str, Any]:
    return (
        _text_config()
        | _token_ids()
        | {
            "architectures": [architecture],
            "attention_dropout": 0.0,
            "max_window_layers": LAYERS,
            "model_type": model_type,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
            "vision_config": vision,
        }
    )


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out, into)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes


def norm(name: str, size: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def _tower_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensor names under `visual.` with their shapes."""
    v, kind = config["vision_config"], config["model_type"]
    size, patch, out = TOWER_SIZE, v["patch_size"], HIDDEN
    shapes: Shapes = {"patch_embed.proj.weight": (size, 3, 2, patch, patch)}
    norm_bias = kind != "qwen2_5_vl"
    for i in range(v["depth"]):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1", size, norm_bias)
        shapes |= norm(f"{block}.norm2", size, norm_bias)
        shapes |= linear(f"{block}.attn.qkv", 3 * size, size)
        shapes |= linear(f"{block}.attn.proj", size, size)
        shapes |= _tower_mlp(f"{block}.mlp", v, kind)
    newer = ("norm", "linear_fc1", "linear_fc2")
    names = newer if kind == "qwen3_vl" else ("ln_q", "mlp.0", "mlp.2")
    shapes |= _merger("merger", names, size, out, norm_bias)
    if kind == "qwen3_vl":
        shapes["patch_embed.proj.bias"] = (size,)
        shapes["pos_embed.weight"] = (v["num_position_embeddings"], size)
        for i in range(len(v["deepstack_visual_indexes"])):
            shapes |= _merger(f"deepstack_merger_list.{i}", names, 4 * size, out, True)
    return shapes


def _tower_mlp(name: str, vision: Mapping[str, Any], kind: str) -> Shapes:
    if kind == "qwen2_vl":
        inner = TOWER_SIZE * vision["mlp_ratio"]
        return linear(f"{name}.fc1", inner, TOWER_SIZE) | linear(f"{name}.fc2", TOWER_SIZE, inner)
    inner = vision["intermediate_size"]
    if kind == "qwen3_vl":
        first = linear(f"{name}.linear_fc1", inner, TOWER_SIZE)
        return first | linear(f"{name}.linear_fc2", TOWER_SIZE, inner)
    gate = linear(f"{name}.gate_proj", inner, TOWER_SIZE)
    up = linear(f"{name}.up_proj", inner, TOWER_SIZE)
    return gate | up | linear(f"{name}.down_proj", TOWER_SIZE, inner)


def _merger(
    name: str, parts: tuple[str, str, str], normed: int, out: int, norm_bias: bool
) -> Shapes:
    before, first, second = (f"{name}.{part}" for part in parts)
    unit = 4 * TOWER_SIZE
    shapes = norm(before, normed, norm_bias) | linear(first, unit, unit)
    return shapes | linear(second, out, unit)


def _decoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensor names under `model.` with their shapes."""
    text = config.get("text_config") or config
    newer = "text_config" in config
    head_dim = text.get("head_dim") or HIDDEN // HEADS
    shapes: Shapes = {"embed_tokens.weight": (text["vocab_size"], HIDDEN), "norm.weight": (HIDDEN,)}
    for i in range(text["num_hidden_layers"]):
        layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
        shapes |= norm(f"{layer}.input_layernorm", HIDDEN, bias=False)
        shapes |= norm(f"{layer}.post_attention_layernorm", HIDDEN, bias=False)
        shapes |= linear(f"{attention}.q_proj", HEADS * head_dim, HIDDEN, bias=not newer)
        shapes |= linear(f"{attention}.k_proj", KV_HEADS * head_dim, HIDDEN, bias=not newer)
        shapes |= linear(f"{attention}.v_proj", KV_HEADS * head_dim, HIDDEN, bias=not newer)
        shapes |= linear(f"{attention}.o_proj", HIDDEN, HEADS * head_dim, bias=False)
        for part in ("gate_proj", "up_proj"):
            shapes |= linear(f"{layer}.mlp.{part}", INNER, HIDDEN, bias=False)
        shapes |= linear(f"{layer}.mlp.down_proj", HIDDEN, INNER, bias=False)
        if newer:
            shapes |= norm(f"{attention}.q_norm", head_dim, bias=False)
            shapes |= norm(f"{attention}.k_norm", head_dim, bias=False)
    return shapes


def random_tensors(shapes: Shapes, seed: int, gain: float = 1.5) -> dict[str, np.ndarray]:
    """Values that let information through: no layer's output dwarfs another's."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            fan_in = int(np.prod(shape[1:]))
            scale = 1.0 if "embed" in name and "patch" not in name else gain * fan_in**-0.5
            values *= np.float32(scale)
        elif name.endswith(".bias"):
            values *= np.float32(0.1)
        else:
            values = 1 + np.float32(0.1) * values
        tensors[name] = values
    return tensors


def _write(
    folder: Path,
    config: dict[str, Any],
    tower: Shapes,
    prefix: str,
    *,
    seed: int = 0,
    tied: bool = False,
    files: int = 1,
    max_pixels: int = 28 * 28 * 64,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder. `prefix` stands before the tower's and the decoder's names (Qwen3-VL)."""
    language = "model.language_model." if prefix else "model."
    shapes = {f"{prefix}visual.{n}": s for n, s in tower.items()}
    shapes |= {f"{language}{n}": s for n, s in _decoder_shapes(config).items()}
    config = config | {"tie_word_embeddings": tied}
    if not tied:
        shapes["lm_head.weight"] = shapes[f"{language}embed_tokens.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    _write_processor(folder, config, max_pixels, generation)
    write_weights(folder, random_tensors(shapes, seed), files)
    return folder


def _write_processor(
    folder: Path, config: Mapping[str, Any], max_pixels: int, generation: Mapping[str, Any] | None
) -> None:
    newer = config["model_type"] == "qwen3_vl"
    patch = config["vision_config"]["patch_size"]
    ids = special_ids()
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor" if newer else "Qwen2VLProcessor",
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3 if newer else CLIP_MEAN,
        "image_std": [0.5] * 3 if newer else CLIP_STD,
    }
    low = (2 * patch) ** 2 * 4
    if newer:
        processor["size"] = {"shortest_edge": low, "longest_edge": max_pixels}
    else:
        processor |= {"min_pixels": low, "max_pixels": max_pixels}
    write_json(folder / "preprocessor_config.json", processor)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": stops, "pad_token_id": ids["<|endoftext|>"], **(generation or {})},
    )
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray], files: int = 1) -> None:
    """Write model.safetensors, or `files` parts with their index."""
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for part in range(files):
        name = f"model-{part + 1:05}-of-{files:05}.safetensors"
        own = {n: t for i, (n, t) in enumerate(tensors.items()) if i % files == part}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    total = sum(t.nbytes for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
