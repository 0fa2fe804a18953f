"""Sizes that divide nothing and keys that say something odd: transformers' logits all the same.

Each case is a config that once crashed or gave other logits, found by drawing random ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.helpers import gemma_checkpoint, tiny_tokenizer
from tests.helpers.parity import (
    Prompt,
    difference,
    make_prompt,
    open_found,
    our_logits,
    random_image,
    random_text,
)
from tests.helpers.smolvlm_checkpoint import SPECIAL
from tests.helpers.twin_checkpoint import write_twin

Config = dict[str, Any]
IDS = tiny_tokenizer.special_ids()
TEXT = {
    "hidden_size": 60,
    "intermediate_size": 52,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 433,
    "max_position_embeddings": 4096,
}
TOWER = {"depth": 3, "num_heads": 3, "out_hidden_size": 60, "patch_size": 9}
STALE = {"hidden_size": 999, "num_hidden_layers": 7, "rope_theta": 5.0, "rms_norm_eps": 0.5}
PIXELS = {"min_pixels": 27**2, "max_pixels": 27**2 * 30}
NEAR = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 9}


def _qwen(kind: str, name: str, text: Config, vision: Config, **config: Any) -> Config:
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "text_config": TEXT | text,
        "vision_config": TOWER | vision,
        **config,
    }


QWEN = {
    "sections of four, a tower's theta": _qwen(
        "qwen2_vl",
        "Qwen2VL",
        {"rope_scaling": {"mrope_section": [1, 2, 2, 1], "type": "mrope"}, "hidden_act": "swish"},
        {"embed_dim": 48, "hidden_size": 60, "rope_parameters": {"rope_theta": 100.0}},
    ),
    "windows by layer_types, stale keys": _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        {
            "rope_parameters": {"mrope_section": [2, 3, 1], "mrope_interleaved": True},
            "layer_types": ["sliding_attention", "full_attention"],
            **NEAR,
        },
        {
            "hidden_size": 48,
            "intermediate_size": 33,
            "spatial_merge_size": 3,
            "temporal_patch_size": 1,
            "window_size": 58,
            "fullatt_block_indexes": [],
        },
        **STALE,
    ),
    "a table beyond its square, deepstack beyond its depth": _qwen(
        "qwen3_vl",
        "Qwen3VL",
        {"head_dim": 16, "rope_parameters": {"mrope_section": [3, 2, 2], "rope_theta": 777.0}},
        {
            "hidden_size": 48,
            "intermediate_size": 33,
            "num_position_embeddings": 11,
            "deepstack_visual_indexes": [2, 0, 8],
        },
    ),
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "image_token_id": gemma_checkpoint.IDS[gemma_checkpoint.SOFT],
    "mm_tokens_per_image": 9,
    "text_config": TEXT
    | {
        "head_dim": 10,
        "sliding_window": 2,
        "final_logit_softcapping": 1.0,
        "attn_logit_softcapping": 1.0,
        "tie_word_embeddings": False,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "vision_config": {
        "hidden_size": 20,
        "intermediate_size": 33,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 38,
        "patch_size": 5,
        "model_type": "siglip_vision_model",
    },
}
SMOLVLM = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "model_type": "smolvlm",
    "scale_factor": 5,
    "image_token_id": tiny_tokenizer.special_ids(SPECIAL)["<image>"],
    "text_config": TEXT | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 33,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 102,
        "patch_size": 4,
    },
}


def _prompt(family: Any) -> Prompt:
    parts = [random_text(4, 1, 250), random_image(61, 45), random_text(6, 2, 250)]
    return make_prompt(family, [*parts, random_image(40, 90, 1), random_text(5, 3, 250)])


def _check(folder: Path, theirs: Any, processor: Any, marks: str | None = None) -> None:
    ours = open_found(folder)
    prompt = _prompt(ours.family)
    pictures = [Image.fromarray(image) for image in prompt.images]
    ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
    given = dict(processor.from_pretrained(folder)([pictures], return_tensors="pt"))
    given.pop("num_crops", None)
    if marks:
        given[marks] = (ids == ours.family.image_token_id).int()
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0]
        assert difference(our_logits(ours, prompt), expected) < 1e-4


@pytest.mark.parametrize("case", QWEN)
def test_qwen_vl(tmp_path: Path, case: str) -> None:
    tower = QWEN[case]["vision_config"]
    merge, temporal = tower.get("spatial_merge_size", 2), tower.get("temporal_patch_size", 2)
    sizes = {"patch_size": 9, "merge_size": merge, "temporal_patch_size": temporal}
    theirs = write_twin(tmp_path, QWEN[case], PIXELS | sizes, tiny_tokenizer.tokenizer_json())
    _check(tmp_path, theirs, Qwen2VLImageProcessorPil, "mm_token_type_ids")


def test_gemma3(tmp_path: Path) -> None:
    """7 x 7 patches averaged by 2 x 2: the last row and column count in no token."""
    processor = {"size": {"height": 38, "width": 38}}
    theirs = write_twin(tmp_path, GEMMA, processor, gemma_checkpoint.tokenizer_json())
    _check(tmp_path, theirs, Gemma3ImageProcessorPil, "token_type_ids")


@pytest.mark.parametrize("tile", [102, 40])
def test_smolvlm(tmp_path: Path, tile: int) -> None:
    """Of 25 patches transformers gives some the position before theirs; tiles may be smaller."""
    processor = {"max_image_size": {"longest_edge": tile}, "size": {"longest_edge": tile}}
    theirs = write_twin(tmp_path, SMOLVLM, processor, tiny_tokenizer.tokenizer_json(SPECIAL))
    _check(tmp_path, theirs, SmolVLMImageProcessorPil)
