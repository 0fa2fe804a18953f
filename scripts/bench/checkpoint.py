"""A model folder of Qwen2.5-VL's shapes with random weights, in the hub's own layout.

Writes config, processor and generation files, copies a tokenizer, and fills the tensors with
small random numbers, shard after shard, so that a 7B model takes seconds on /dev/shm. Speed does
not depend on what a model knows; answers of such a model are noise.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 << 30
SIZES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4,
        "vocab": 152064, "depth": 32, "vision_hidden": 1280, "vision_intermediate": 3420,
        "vision_heads": 16, "window": 112,
    },
    "3b": {
        "hidden": 2048, "intermediate": 11008, "layers": 36, "heads": 16, "kv_heads": 2,
        "vocab": 151936, "depth": 32, "vision_hidden": 1280, "vision_intermediate": 3420,
        "vision_heads": 16, "window": 112,
    },
    "tiny": {
        "hidden": 256, "intermediate": 512, "layers": 2, "heads": 2, "kv_heads": 1,
        "vocab": 152064, "depth": 4, "vision_hidden": 128, "vision_intermediate": 256,
        "vision_heads": 2, "window": 112,
    },
}  # fmt: skip
SPECIAL = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
ROPE = {"7b": [16, 24, 24], "3b": [16, 24, 24], "tiny": [16, 24, 24]}


def make(folder: Path, size: str, tokenizer: Path, device: str = "cpu") -> Path:
    """Write the folder unless it is already whole; `config.json` is written last."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = SIZES[size]
        _copy_tokenizer(tokenizer, folder)
        _write_small_files(folder)
        write_weights(folder, dict(tensors(sizes)), device)
        _write(folder / "config.json", config(sizes, ROPE[size]))
    return folder


def config(sizes: dict[str, int], sections: list[int]) -> dict[str, Any]:
    """The config.json of Qwen2.5-VL with these sizes."""
    return {
        **SPECIAL,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "max_window_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["kv_heads"],
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes["vocab"],
        "vision_config": _vision_config(sizes),
    }


def _vision_config(sizes: dict[str, int]) -> dict[str, Any]:
    depth = sizes["depth"]
    return {
        "model_type": "qwen2_5_vl",
        "depth": depth,
        "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7] or [depth - 1],
        "hidden_act": "silu",
        "hidden_size": sizes["vision_hidden"],
        "in_chans": 3,
        "intermediate_size": sizes["vision_intermediate"],
        "num_heads": sizes["vision_heads"],
        "out_hidden_size": sizes["hidden"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": sizes["window"],
    }


def tensors(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint: its name in the hub's files and its shape."""
    hidden, vocab = sizes["hidden"], sizes["vocab"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(sizes["layers"]):
        yield from _decoder_layer(f"model.layers.{layer}.", sizes)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    width = sizes["vision_hidden"]
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for block in range(sizes["depth"]):
        yield from _vision_block(f"visual.blocks.{block}.", sizes)
    yield "visual.merger.ln_q.weight", (width,)
    yield from _linear("visual.merger.mlp.0", 4 * width, 4 * width)
    yield from _linear("visual.merger.mlp.2", 4 * width, hidden)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _decoder_layer(start: str, sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    head = hidden // sizes["heads"]
    yield f"{start}input_layernorm.weight", (hidden,)
    yield f"{start}post_attention_layernorm.weight", (hidden,)
    yield from _linear(f"{start}self_attn.q_proj", hidden, sizes["heads"] * head)
    yield from _linear(f"{start}self_attn.k_proj", hidden, sizes["kv_heads"] * head)
    yield from _linear(f"{start}self_attn.v_proj", hidden, sizes["kv_heads"] * head)
    yield f"{start}self_attn.o_proj.weight", (hidden, sizes["heads"] * head)
    yield f"{start}mlp.gate_proj.weight", (inner, hidden)
    yield f"{start}mlp.up_proj.weight", (inner, hidden)
    yield f"{start}mlp.down_proj.weight", (hidden, inner)


def _vision_block(start: str, sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = sizes["vision_hidden"], sizes["vision_intermediate"]
    yield f"{start}norm1.weight", (width,)
    yield f"{start}norm2.weight", (width,)
    yield from _linear(f"{start}attn.qkv", width, 3 * width)
    yield from _linear(f"{start}attn.proj", width, width)
    yield from _linear(f"{start}mlp.gate_proj", width, inner)
    yield from _linear(f"{start}mlp.up_proj", width, inner)
    yield from _linear(f"{start}mlp.down_proj", inner, width)


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], device: str) -> None:
    import torch
    from safetensors.torch import save_file

    from scripts.bench.random_weights import random_tensor

    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    shards = list(_shards(shapes))
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {n: random_tensor(n, shapes[n], torch.bfloat16, generator).cpu() for n in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if device != "cpu":
        torch.cuda.empty_cache()
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2
        for length in shape:
            num_bytes *= length
        if names and size + num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Take tokenizer.json and its config from a folder, or from `NAME.json.xz` files in it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        plain, packed = source / name, source / f"{name}.xz"
        if plain.exists():
            shutil.copyfile(plain, folder / name)
        elif packed.exists():
            (folder / name).write_bytes(lzma.decompress(packed.read_bytes()))
        else:
            raise SystemExit(f"{source} has no {name}; scripts/gpu/prepare.sh fetches one.")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen2_5_VLProcessor"}
    _write(folder / "tokenizer_config.json", settings)


def _write_small_files(folder: Path) -> None:
    _write(
        folder / "preprocessor_config.json",
        {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "processor_class": "Qwen2_5_VLProcessor",
            "temporal_patch_size": 2,
        },
    )
    eos = [SPECIAL["eos_token_id"], SPECIAL["bos_token_id"]]
    _write(
        folder / "generation_config.json",
        {"bos_token_id": SPECIAL["bos_token_id"], "do_sample": False, "eos_token_id": eos},
    )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
