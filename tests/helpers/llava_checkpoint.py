"""Writes small random LLaVA checkpoints: the original layouts, and transformers' twin of each.

Both have the same tensors under other names. LLaVA 1.5 comes as `.bin` shards whose image tower
lies in a folder of its own; the others are safetensors with the tower inside. For tests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.vocabularies.entries import added_token
from tests.helpers.checkpoints import Shapes, random_tensors, write_json, write_weights
from tests.helpers.sentencepiece_model import LLAMA, YI, model_bytes
from tests.helpers.tiny_tokenizer import special_ids, tokenizer_json

HIDDEN, INNER, LAYERS, HEADS = 32, 48, 2, 4
WIDTH, TOWER_INNER, TOWER_HEADS, PATCH = 24, 40, 2, 4
# (width, height) as the original files have them; ties depend on the order.
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


@dataclass(frozen=True)
class Kind:
    """What tells one of the checkpoints from another."""

    architecture: str
    decoder: str
    twin: str
    tower: str = "clip"
    aspect: str = "anyres"
    kv_heads: int = HEADS
    vocabulary: int = 512
    tokens: str = "llama"  # llama | yi | qwen | llama3
    inside: bool = True  # the tower is part of the checkpoint
    blocks: int = 3
    side: int = 24


NEXT = "LlavaNextForConditionalGeneration"
KINDS = {
    "1.5": Kind(
        "LlavaLlamaForCausalLM", "llama", "LlavaForConditionalGeneration", aspect="pad",
        inside=False,
    ),
    "1.6": Kind("LlavaLlamaForCausalLM", "llama", NEXT),
    "1.6-mistral": Kind("LlavaMistralForCausalLM", "mistral", NEXT, kv_heads=2),
    "1.6-yi": Kind("LlavaLlamaForCausalLM", "llama", NEXT, kv_heads=2, tokens="yi"),
    "next-qwen": Kind("LlavaQwenForCausalLM", "qwen2", NEXT, kv_heads=2, tokens="qwen"),
    "next-llama3": Kind(
        "LlavaLlamaForCausalLM", "llama", NEXT, kv_heads=2, tokens="llama3", vocabulary=128_320
    ),
    "onevision": Kind(
        "LlavaQwenForCausalLM", "qwen2", "LlavaOnevisionForConditionalGeneration",
        tower="siglip", aspect="anyres_max_2", kv_heads=2, tokens="qwen",
        side=26,  # no whole number of patches, as 384 of 14
    ),
}  # fmt: skip


def write_original(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write the layout of liuhaotian's and lmms-lab's repositories."""
    k = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _original_config(k))
    write_tokenizer(folder, kind)
    tensors = random_tensors(_shapes(k), seed)
    tower = folder / f"{k.tower}-tiny"
    tower.mkdir(exist_ok=True)
    write_json(tower / "config.json", {"vision_config": _vision_config(k)})
    names = {name: _original_name(name) for name in tensors}
    if not k.inside:
        _write_stock(tower, {n: t for n, t in tensors.items() if n.startswith("vision_tower.")})
        names = {n: new for n, new in names.items() if not n.startswith("vision_tower.")}
        _write_bins(folder, {new: tensors[name] for name, new in names.items()})
    else:
        # The original code throws SigLIP's last block away before it saves.
        last = f"vision_tower.encoder.layers.{k.blocks - 1}."
        cut = {} if k.tower == "clip" else {n for n in names if n.startswith(last)}
        kept = {new: tensors[n] for n, new in names.items() if n not in cut}
        write_weights(folder, kept, files=2)
    return folder


def write_twin(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write transformers' layout of the same model, with the names that its hub copies have."""
    k = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _twin_config(k))
    write_tokenizer(folder, kind)
    write_json(folder / "preprocessor_config.json", _processor(k))
    tensors = random_tensors(_shapes(k), seed)
    last = f"vision_tower.encoder.layers.{k.blocks - 1}."
    cut = last if k.tower == "siglip" else "none"
    kept = {_twin_name(n): t for n, t in tensors.items() if not n.startswith(cut)}
    write_weights(folder, kept)
    return folder


def image_id(kind: str) -> int:
    """The twin's image token."""
    return KINDS[kind].vocabulary - 1


def _text(k: Kind) -> dict[str, Any]:
    ids = special_ids()
    text = {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": ids["<|im_end|>"] if k.tokens == "qwen" else 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": k.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0 if k.decoder == "llama" else 1e6,
        "vocab_size": k.vocabulary,
    }
    more = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
    return text | more.get(k.decoder, {})


def _vision_config(k: Kind) -> dict[str, Any]:
    return {
        "model_type": f"{k.tower}_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": TOWER_INNER,
        "num_attention_heads": TOWER_HEADS,
        "num_hidden_layers": k.blocks,
        "image_size": k.side,
        "patch_size": PATCH,
    }


def _original_config(k: Kind) -> dict[str, Any]:
    tiled = {
        "mm_patch_merge_type": "spatial_unpad",
        # One repository writes a list, another its text, a third a range of tiles.
        "image_grid_pinpoints": "(1x1),...,(3x3)" if k.tower == "siglip" else str(PINPOINTS),
    }
    return {
        **_text(k),
        "architectures": [k.architecture],
        "model_type": "llava",
        "image_aspect_ratio": k.aspect,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"{k.tower}-tiny",
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "torch_dtype": "float32",
        "use_mm_proj": True,
        **({} if k.aspect == "pad" else tiled),
    }


def pinpoints(kind: str) -> list[list[int]]:
    """The twin's pairs, (height, width)."""
    k = KINDS[kind]
    if k.tower == "siglip":
        return [[k.side * j, k.side * i] for i in range(1, 4) for j in range(1, 4)]
    return [[height, width] for width, height in PINPOINTS]


def _twin_config(k: Kind) -> dict[str, Any]:
    siglip = k.tower == "siglip"
    vision = _vision_config(k) | {"num_hidden_layers": k.blocks - siglip}
    if siglip:
        vision["vision_use_head"] = False
    config: dict[str, Any] = {
        "architectures": [k.twin],
        "model_type": {
            "LlavaForConditionalGeneration": "llava",
            NEXT: "llava_next",
        }.get(k.twin, "llava_onevision"),
        "image_token_index": k.vocabulary - 1,
        "projector_hidden_act": "gelu",
        "text_config": _text(k) | {"model_type": k.decoder},
        "tie_word_embeddings": False,
        "vision_config": vision,
        "vision_feature_layer": -1 if siglip else -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
    }
    if k.aspect != "pad":
        name = next(name for name, kind in KINDS.items() if kind is k)
        config["image_grid_pinpoints"] = pinpoints(name)
    if siglip:
        config |= {"vision_aspect_ratio": k.aspect, "video_token_index": k.vocabulary - 2}
    return config


def _processor(k: Kind) -> dict[str, Any]:
    if k.tower == "siglip":
        half = [0.5] * 3
        return {"size": {"height": k.side, "width": k.side}, "image_mean": half, "image_std": half}
    edges = {"crop_size": {"height": k.side, "width": k.side}, "size": {"shortest_edge": k.side}}
    return {"do_center_crop": True, "do_resize": True, **edges}


def _shapes(k: Kind) -> Shapes:
    shapes: Shapes = {}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, size: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (size,)
        if bias:
            shapes[f"{name}.bias"] = (size,)

    _tower(k, shapes, linear, norm)
    linear("projector.0", HIDDEN, WIDTH)
    linear("projector.2", HIDDEN, HIDDEN)
    if k.aspect != "pad":
        shapes["image_newline"] = (HIDDEN,)
    shapes["model.embed_tokens.weight"] = (k.vocabulary, HIDDEN)
    for i in range(LAYERS):
        layer, kv = f"model.layers.{i}", k.kv_heads * HIDDEN // HEADS
        norm(f"{layer}.input_layernorm", HIDDEN, False)
        norm(f"{layer}.post_attention_layernorm", HIDDEN, False)
        for part, out in (("q", HIDDEN), ("k", kv), ("v", kv)):
            linear(f"{layer}.self_attn.{part}_proj", out, HIDDEN, k.decoder == "qwen2")
        linear(f"{layer}.self_attn.o_proj", HIDDEN, HIDDEN, False)
        for part in ("gate", "up"):
            linear(f"{layer}.mlp.{part}_proj", INNER, HIDDEN, False)
        linear(f"{layer}.mlp.down_proj", HIDDEN, INNER, False)
    norm("model.norm", HIDDEN, False)
    linear("lm_head", k.vocabulary, HIDDEN, False)
    return shapes


def _tower(k: Kind, shapes: Shapes, linear: Any, norm: Any) -> None:
    name, patches = "vision_tower", (k.side // PATCH) ** 2
    shapes[f"{name}.embeddings.patch_embedding.weight"] = (WIDTH, 3, PATCH, PATCH)
    if k.tower == "clip":
        shapes[f"{name}.embeddings.class_embedding"] = (WIDTH,)
        norm(f"{name}.pre_layrnorm", WIDTH, True)
    else:
        shapes[f"{name}.embeddings.patch_embedding.bias"] = (WIDTH,)
    places = patches + (k.tower == "clip")
    shapes[f"{name}.embeddings.position_embedding.weight"] = (places, WIDTH)
    norm(f"{name}.post_layernorm", WIDTH, True)
    for i in range(k.blocks):
        block = f"{name}.encoder.layers.{i}"
        norm(f"{block}.layer_norm1", WIDTH, True)
        norm(f"{block}.layer_norm2", WIDTH, True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{block}.self_attn.{part}", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", TOWER_INNER, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, TOWER_INNER)


def _original_name(name: str) -> str:
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.", 1)
    if name.startswith("projector."):
        return name.replace("projector.", "model.mm_projector.", 1)
    return f"model.{name}" if name == "image_newline" else name


def _twin_name(name: str) -> str:
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("projector."):
        index = {"0": "linear_1", "2": "linear_2"}[name.split(".")[1]]
        return f"multi_modal_projector.{index}.{name.split('.')[2]}"
    return name if name == "image_newline" else f"language_model.{name}"


def _write_stock(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """The tower as CLIP's own repository has it: pickled, with the text half beside it."""
    named = {n.replace("vision_tower.", "vision_model.", 1): t for n, t in tensors.items()}
    named["text_model.final_layer_norm.weight"] = np.ones(WIDTH, np.float32)
    named["logit_scale"] = np.zeros((), np.float32)
    torch.save({n: torch.from_numpy(t.copy()) for n, t in named.items()}, _bin(folder))


def _bin(folder: Path, part: str = "") -> Path:
    return folder / f"pytorch_model{part}.bin"


def _write_bins(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Two pickled shards with their index, and the projector's stray second copy."""
    weight_map = {}
    for number in (1, 2):
        own = {
            n: torch.from_numpy(t)
            for i, (n, t) in enumerate(tensors.items())
            if i % 2 + 1 == number
        }
        file = _bin(folder, f"-0000{number}-of-00002")
        torch.save(own, file)
        weight_map |= dict.fromkeys(own, file.name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)
    torch.save({}, folder / "mm_projector.bin")


def write_tokenizer(folder: Path, kind: str) -> None:
    """tokenizer.model or tokenizer.json, and tokenizer_config.json."""
    k = KINDS[kind]
    if k.tokens not in ("llama", "yi"):
        text = tokenizer_json() if k.tokens == "qwen" else tokenizer_json(LLAMA_3_SPECIAL)
        (folder / "tokenizer.json").write_text(text, "utf-8")
        return
    yi = k.tokens == "yi"
    (folder / "tokenizer.model").write_bytes(model_bytes(YI if yi else LLAMA))
    config: dict[str, Any] = {
        "add_bos_token": not yi,
        "add_eos_token": False,
        "legacy": k.decoder == "mistral",
        "tokenizer_class": "LlamaTokenizer",
    }
    if yi:
        config |= {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}
        entries = {str(i): added_token(i, token) for i, (token, _) in enumerate(YI)}
        config["added_tokens_decoder"] = entries
    write_json(folder / "tokenizer_config.json", config)
