"""Writes small random MiniCPM-V and MiniCPM-o 2.6 checkpoints as the original repositories do.

For tests only: flat config.json, original tensor names, processor settings, tokenizer. The same
seed gives the same bytes. Imports neither torch nor transformers.
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
from tests.helpers.tiny_tokenizer import SPECIAL, special_ids, tokenizer_json

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 256, 96, 2, 4, 2
VISION = {
    "hidden_size": 32,
    "image_size": 980,
    "intermediate_size": 52,
    "model_type": "siglip",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 14,
}
QUERIES = 8
MARKERS = (
    "<image>",
    "</image>",
    "<ref>",
    "</ref>",
    "<slice>",
    "</slice>",
    "<image_id>",
    "</image_id>",
    "<unk>",
)
SOUND_MARKERS = (
    "<|audio_start|>",
    "<|audio_end|>",
    "<|spk_bos|>",
    "<|spk|>",
    "<|spk_eos|>",
    "<|tts_bos|>",
    "<|tts_eos|>",
)
AUDIO = {
    "activation_function": "gelu",
    "d_model": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "encoder_layers": 2,
    "max_source_positions": 1500,
    "num_mel_bins": 80,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": special_ids()["<|endoftext|>"],
        "eos_token_id": special_ids()["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "max_window_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 64 * (vocabulary // 64 + 1),
    }


def write_minicpm_v(folder: Path, *, seed: int = 0, drop_last: bool = False) -> Path:
    """Write a MiniCPM-V 2.6; with `drop_last` its tower's last layer is neither stored nor run."""
    special = (*SPECIAL, *MARKERS)
    config = _config(special) | {
        "architectures": ["MiniCPMV"],
        "drop_vision_last_layer": drop_last,
        "model_type": "minicpmv",
    }
    shapes = vision_shapes(drop_last) | decoder_shapes(config["vocab_size"])
    return _write(folder, config, special, shapes, seed)


def write_minicpm_o(folder: Path, *, seed: int = 0) -> Path:
    """Write a MiniCPM-o 2.6, its speech synthesis a stand-in of one tensor."""
    special = (*SPECIAL, *MARKERS, *SOUND_MARKERS)
    config = _config(special) | {
        "architectures": ["MiniCPMO"],
        "audio_chunk_length": 1.0,
        "audio_config": AUDIO,
        "audio_pool_step": 2,
        "chunk_input": True,
        "drop_vision_last_layer": False,
        "init_audio": True,
        "init_tts": True,
        "init_vision": True,
        "model_type": "minicpmo",
        "stream_input": False,
    }
    shapes = vision_shapes(False) | decoder_shapes(config["vocab_size"]) | audio_shapes()
    shapes["tts.projector.linear1.weight"] = (4, 4)
    return _write(folder, config, special, shapes, seed)


def _config(special: tuple[str, ...]) -> dict[str, Any]:
    return text_config(max(special_ids(special).values()) + 1) | {
        "batch_vision_input": True,
        "image_size": 448,
        "patch_size": 14,
        "query_num": QUERIES,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "slice_mode": True,
        "use_image_id": True,
        "version": 2.6,
        "vision_batch_size": 16,
        "vision_config": VISION,
    }


def _write(
    folder: Path, config: dict[str, Any], special: tuple[str, ...], shapes: Shapes, seed: int
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor_config())
    (folder / "tokenizer.json").write_text(tokenizer_json(special), encoding="utf-8")
    system = "You are a helpful assistant."
    if config["model_type"] == "minicpmo":
        system = f"You are Qwen, created by Alibaba Cloud. {system}"
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "chat_template": CHAT_TEMPLATE.replace("SYSTEM", system),
        },
    )
    write_weights(folder, random_tensors(shapes, seed))
    return folder


def processor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": True,
        "image_feature_size": QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.6,
    }


def vision_shapes(drop_last: bool) -> Shapes:
    """The tower (`vpm`) and the resampler."""
    size, inner = VISION["hidden_size"], VISION["intermediate_size"]
    shapes: Shapes = {
        "vpm.embeddings.patch_embedding.weight": (size, 3, 14, 14),
        "vpm.embeddings.patch_embedding.bias": (size,),
        "vpm.embeddings.position_embedding.weight": (4900, size),
        "resampler.query": (QUERIES, HIDDEN),
        "resampler.proj": (HIDDEN, HIDDEN),
        "resampler.attn.in_proj_weight": (3 * HIDDEN, HIDDEN),
        "resampler.attn.in_proj_bias": (3 * HIDDEN,),
        **linear("resampler.attn.out_proj", HIDDEN, HIDDEN),
        **linear("resampler.kv_proj", HIDDEN, size, bias=False),
        **norm("vpm.post_layernorm", size),
    }
    for part in ("ln_q", "ln_kv", "ln_post"):
        shapes |= norm(f"resampler.{part}", HIDDEN)
    for i in range(VISION["num_hidden_layers"] - drop_last):
        layer = f"vpm.encoder.layers.{i}"
        shapes |= norm(f"{layer}.layer_norm1", size) | norm(f"{layer}.layer_norm2", size)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", size, size)
        shapes |= linear(f"{layer}.mlp.fc1", inner, size) | linear(f"{layer}.mlp.fc2", size, inner)
    return shapes


def audio_shapes() -> Shapes:
    """Whisper's encoder (`apm`) and the projection."""
    size, inner = int(AUDIO["d_model"]), int(AUDIO["encoder_ffn_dim"])
    shapes: Shapes = {
        "apm.conv1.weight": (size, 80, 3),
        "apm.conv1.bias": (size,),
        "apm.conv2.weight": (size, size, 3),
        "apm.conv2.bias": (size,),
        "apm.embed_positions.weight": (1500, size),
        **norm("apm.layer_norm", size),
        **linear("audio_projection_layer.linear1", HIDDEN, size),
        **linear("audio_projection_layer.linear2", HIDDEN, HIDDEN),
    }
    for i in range(int(AUDIO["encoder_layers"])):
        layer = f"apm.layers.{i}"
        shapes |= norm(f"{layer}.self_attn_layer_norm", size)
        shapes |= norm(f"{layer}.final_layer_norm", size)
        for part in ("q_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", size, size)
        shapes |= linear(f"{layer}.self_attn.k_proj", size, size, bias=False)
        shapes |= linear(f"{layer}.fc1", inner, size) | linear(f"{layer}.fc2", size, inner)
    return shapes


def decoder_shapes(vocabulary: int) -> Shapes:
    head = HIDDEN // HEADS
    shapes: Shapes = {
        "llm.model.embed_tokens.weight": (vocabulary, HIDDEN),
        "llm.lm_head.weight": (vocabulary, HIDDEN),
        "llm.model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"llm.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes |= linear(f"{layer}.self_attn.q_proj", HEADS * head, HIDDEN)
        shapes |= linear(f"{layer}.self_attn.k_proj", KV_HEADS * head, HIDDEN)
        shapes |= linear(f"{layer}.self_attn.v_proj", KV_HEADS * head, HIDDEN)
        shapes |= linear(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * head, bias=False)
        for part in ("gate_proj", "up_proj"):
            shapes |= linear(f"{layer}.mlp.{part}", INNER, HIDDEN, bias=False)
        shapes |= linear(f"{layer}.mlp.down_proj", HIDDEN, INNER, bias=False)
    return shapes
