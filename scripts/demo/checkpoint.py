"""Writes the trained network as a Qwen2.5-VL folder: weights, configuration, tokenizer, processor.

It knows the file formats, not how the weights came to be.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo import render, tokens
from demo.network import Network, Shape
from demo.vocabulary import HEIGHT, WIDTH


def configuration(shape: Shape, tokenizer: Tokenizer) -> dict:
    """config.json, flat like the published Qwen2.5-VL checkpoints."""
    ids = {name: tokenizer.token_to_id(name) for name in tokens.SPECIAL}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": shape.theta,
        "sliding_window": 2048,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope)},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": shape.vision_depth,
            "hidden_act": "silu",
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "in_chans": 3,
            "in_channels": 3,
            "out_hidden_size": shape.hidden,
            "patch_size": render.PATCH,
            "spatial_merge_size": render.MERGE,
            "spatial_patch_size": render.PATCH,
            "window_size": shape.window,
            "fullatt_block_indexes": list(shape.full_blocks),
            "tokens_per_second": 2,
            "temporal_patch_size": render.TEMPORAL,
        },
    }


def preprocessor() -> dict:
    """preprocessor_config.json: pictures are brought to about the size the model was trained on."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(render.MEAN),
        "image_std": list(render.STD),
        "min_pixels": WIDTH * HEIGHT // 2,
        "max_pixels": WIDTH * HEIGHT,
        "patch_size": render.PATCH,
        "merge_size": render.MERGE,
        "temporal_patch_size": render.TEMPORAL,
    }


def save(network: Network, tokenizer: Tokenizer, folder: Path, notes: dict) -> None:
    """The whole folder; weights in bfloat16. `notes` become training.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in network.named_parameters()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = configuration(network.shape, tokenizer)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
    }
    for name, content in (
        ("config", config),
        ("preprocessor_config", preprocessor()),
        ("generation_config", generation),
        ("training", notes),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokens.save(tokenizer, folder)


@torch.no_grad()
def round_weights(network: Network) -> None:
    """Rounds the weights in place to what the file will hold."""
    for p in network.parameters():
        p.copy_(p.bfloat16().float())
