"""Writes a small random Gemma 3 as its hub repository has it: names, config keys, tokenizer.

For tests only. The config leaves out what the hub's leave out; the tokenizer is BPE with byte
fallback, blanks as "▁" and runs of newlines as tokens. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import Shapes, random_tensors, write_json, write_weights
from tests.helpers.tiny_tokenizer import TEXT, merges_of

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 4, 2, 24
TOWER_SIZE, TOWER_INNER, TOWER_DEPTH, TOWER_HEADS = 32, 52, 2, 2
SIDE, PATCH, TOKENS, WINDOW = 112, 14, 16, 12
LEADING = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TURNS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
SOFT = "<image_soft_token>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(lead='') %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set text = system if system is string else system[0].text %}"
    "{% set ns.lead = text + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ ns.lead if loop.first else '' }}"
    "{% if m.content is string %}{{ m.content.strip() }}{% else %}{% for part in m.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text.strip() }}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    words = Counter(tuple("▁" + word) for word in TEXT.split())
    merges = [("\n", "\n"), ("\n\n", "\n"), *merges_of(words)]
    chars = sorted({c for word in words for c in word} | set("\nQRS,.!?0123456789"))
    tokens = [*LEADING, *TURNS, *(f"<0x{b:02X}>" for b in range(256)), *chars]
    return list(dict.fromkeys([*tokens, *(a + b for a, b in merges)])), merges


TOKENS_LIST, MERGES = _vocabulary()
IDS = {token: i for i, token in enumerate([*TOKENS_LIST, SOFT])}
VOCAB = 64 * (len(IDS) // 64 + 1)


def tokenizer_json() -> str:
    """The text of tokenizer.json."""
    added = [
        {
            "id": IDS[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (*LEADING, *TURNS, SOFT)
    ]
    blank = {"String": " "}
    split = {"type": "Split", "pattern": blank, "behavior": "MergedWithPrevious", "invert": False}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: IDS[token] for token in TOKENS_LIST},
        "merges": [list(pair) for pair in MERGES],
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": blank, "content": "▁"},
            "pre_tokenizer": split,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }
    )


def _text_config() -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": "gemma3_text",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "query_pre_attn_scalar": 32,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "vocab_size": VOCAB,
    }


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": IDS["<start_of_image>"],
        "eoi_token_index": IDS["<end_of_image>"],
        "eos_token_id": [IDS["<eos>"], IDS["<end_of_turn>"]],
        "image_token_index": IDS[SOFT],
        "initializer_range": 0.02,
        "mm_tokens_per_image": TOKENS,
        "model_type": "gemma3",
        "text_config": _text_config(),
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": TOWER_SIZE,
            "image_size": SIDE,
            "intermediate_size": TOWER_INNER,
            "model_type": "siglip_vision_model",
            "num_attention_heads": TOWER_HEADS,
            "num_hidden_layers": TOWER_DEPTH,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
    }


def _decoder_shapes(stem: str) -> Shapes:
    shapes: Shapes = {
        f"{stem}.embed_tokens.weight": (VOCAB, HIDDEN),
        f"{stem}.norm.weight": (HIDDEN,),
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i in range(LAYERS):
        layer = f"{stem}.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in norms}
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f"{layer}.self_attn.{p}_norm.weight": (HEAD_DIM,) for p in "qk"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return shapes


def siglip_shapes(stem: str, size: int, inner: int, depth: int, side: int, patch: int) -> Shapes:
    """Tensor names of a SigLIP tower without its pooling head."""
    shapes: Shapes = {
        f"{stem}.embeddings.patch_embedding.weight": (size, 3, patch, patch),
        f"{stem}.embeddings.patch_embedding.bias": (size,),
        f"{stem}.embeddings.position_embedding.weight": ((side // patch) ** 2, size),
    }
    norms = [f"{stem}.post_layernorm"]
    for i in range(depth):
        layer = f"{stem}.encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        maps = {f"self_attn.{p}": (size, size) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for part, (out, into) in (
            maps | {"mlp.fc1": (inner, size), "mlp.fc2": (size, inner)}
        ).items():
            shapes |= {f"{layer}.{part}.weight": (out, into), f"{layer}.{part}.bias": (out,)}
    return shapes | {f"{norm}.{part}": (size,) for norm in norms for part in ("weight", "bias")}


def write_gemma3(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of google/gemma-3-*-it, small, and return its folder."""
    shapes = _decoder_shapes("language_model.model") | siglip_shapes(
        "vision_tower.vision_model", TOWER_SIZE, TOWER_INNER, TOWER_DEPTH, SIDE, PATCH
    )
    shapes["multi_modal_projector.mm_input_projection_weight"] = (TOWER_SIZE, HIDDEN)
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (TOWER_SIZE,)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config())
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_pan_and_scan": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": TOKENS,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "size": {"height": SIDE, "width": SIDE},
        },
    )
    write_json(
        folder / "processor_config.json",
        {"image_seq_length": TOKENS, "processor_class": "Gemma3Processor"},
    )
    _write_text_side(folder)
    write_weights(folder, random_tensors(shapes, seed))
    return folder


def write_gemma3_text(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of google/gemma-3-1b-it, small: no tower, keys at the top."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _text_config() | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    config |= {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "torch_dtype": "bfloat16"}
    del config["rope_scaling"]
    write_json(
        folder / "config.json", config | {"eos_token_id": [IDS["<eos>"], IDS["<end_of_turn>"]]}
    )
    _write_text_side(folder)
    write_weights(folder, random_tensors(_decoder_shapes("model"), seed))
    return folder


def _write_text_side(folder: Path) -> None:
    stops = [IDS["<eos>"], IDS["<end_of_turn>"]]
    write_json(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": 0})
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": SOFT,
            "extra_special_tokens": {
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": SOFT,
            },
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": 4096,
        },
    )
