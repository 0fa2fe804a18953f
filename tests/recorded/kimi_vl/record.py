"""Records what Kimi-VL's official code makes of pictures and texts for the small checkpoint.

    PYTHONPATH=REPOSITORY python tests/recorded/kimi_vl/record.py FOLDER

VLM_BATCH_OFFICIAL_KIMI_VL names a folder with the hub repository's files: modeling_kimi_vl.py,
configuration_kimi_vl.py, image_processing_kimi_vl.py, tokenization_moonshot.py (its pattern is what
is used) and chat_template.jinja. transformers 4.38 to 4.50 and tiktoken must be installed. Writes
kimi_vl.json (texts and prompts to ids) and kimi_vl.safetensors (grids of random sizes, pixels,
features). The decoder is not run here: transformers has its class.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from safetensors.numpy import save_file

from tests.helpers.kimi_vl_checkpoint import (
    FIRST,
    IDS,
    MAX_PATCHES,
    PATCH,
    config_of,
    ranked,
    tensors_of,
)
from tests.helpers.parity import random_image

TEXTS = [
    "A user's HTTP server: don't WE'LL stop?",
    "  two  blanks  and\ttab \n\n next\r\n",
    "naïve Größe 东京abc東京 12 123 12345",
    "Describe the IMAGE in detail… <|im_end|>!",
    "",
]
IMAGE = {"type": "image"}
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "system", "content": "S."}, {"role": "user", "content": "How many?"}],
    "image": [{"role": "user", "content": [IMAGE, "Describe this image."]}],
    "between": [{"role": "user", "content": ["first ", IMAGE, " then ", IMAGE, IMAGE, " why "]}],
    "turns": [
        {"role": "user", "content": [IMAGE, "What is it?"]},
        {"role": "assistant", "content": "A red square."},
        {"role": "user", "content": "And here? 東京"},
    ],
}
SIZES = [(64, 48), (33, 90), (28, 28), (300, 170), (7, 5)]
NUM_SIZES = 2000


def official() -> Any:
    """The folder's modules as one package."""
    source = Path(os.environ["VLM_BATCH_OFFICIAL_KIMI_VL"])
    package = types.ModuleType("kimi_vl_official")
    package.__path__ = [str(source)]
    sys.modules[package.__name__] = package
    names = ("modeling_kimi_vl", "configuration_kimi_vl", "image_processing_kimi_vl")
    loaded = {n: importlib.import_module(f"kimi_vl_official.{n}") for n in names}
    pattern = importlib.import_module("kimi_vl_official.tokenization_moonshot")
    template = (source / "chat_template.jinja").read_text("utf-8")
    return types.SimpleNamespace(
        model=loaded["modeling_kimi_vl"],
        config=loaded["configuration_kimi_vl"],
        images=loaded["image_processing_kimi_vl"],
        pattern=pattern.TikTokenTokenizer.pat_str,
        template=Environment(autoescape=False).from_string(template),
    )


def encoding(code: Any) -> Any:
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(ranked())}
    return tiktoken.Encoding(
        "kimi", pat_str=code.pattern, mergeable_ranks=ranks, special_tokens=IDS
    )


def prompt_ids(code: Any, name: str) -> list[int]:
    """Three placeholders stand for each image."""
    turns = [
        turn
        | {"content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in parts]}
        if not isinstance(parts := turn["content"], str)
        else turn
        for turn in PROMPTS[name]
    ]
    text = code.template.render(messages=turns, add_generation_prompt=True)
    text = text.replace("<|media_pad|>", "<|media_pad|>" * 3)
    return encoding(code).encode(text, allowed_special="all")


def random_sizes() -> list[tuple[int, int]]:
    """Sides between 1 and 8,000 pixels, all scales alike."""
    rng = np.random.default_rng(11)
    sides = np.exp(rng.uniform(0, np.log(8000), (NUM_SIZES, 2))).astype(int)
    return [(int(w), int(h)) for w, h in sides]


def grids(code: Any) -> np.ndarray:
    """Patches of random sizes, by the official rule on images that hold no pixel; 0: refused."""

    class Blank:
        mode = "RGB"

        def __init__(self, size: tuple[int, int]) -> None:
            self.size = size

        def resize(self, size: tuple[int, int], *_: Any) -> Blank:
            return Blank(size)

        def paste(self, *_: Any) -> None:
            pass

    processor = code.images.KimiVLImageProcessor(patch_size=14, pad_input=True)
    kept = Image.new
    Image.new = lambda mode, size, color=0: Blank(size)
    try:
        found = [_grid(processor, Blank(size)) for size in random_sizes()]
    finally:
        Image.new = kept
    return np.array(found, np.int32)


def _grid(processor: Any, blank: Any) -> tuple[int, int]:
    try:
        width, height = processor.rescale(blank, [2, 2]).size
    except ValueError:
        return 0, 0
    return height // 14, width // 14


@torch.inference_mode()
def features(code: Any, pixels: torch.Tensor, grid: torch.Tensor) -> np.ndarray:
    config = code.config.KimiVLConfig(**config_of())
    config.vision_config._attn_implementation = "sdpa"
    tower = code.model.MoonVitPretrainedModel(config.vision_config).eval()
    projector = code.model.KimiVLMultiModalProjector(config).eval()
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors_of().items()}
    for module, prefix in ((tower, "vision_tower."), (projector, "multi_modal_projector.")):
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        module.load_state_dict(own)
    return projector(tower(pixels, grid)).numpy()


def main(folder: Path) -> None:
    code = official()
    facts: dict[str, Any] = {name: prompt_ids(code, name) for name in PROMPTS}
    words = encoding(code)
    facts["texts"] = [words.encode(text, disallowed_special=()) for text in TEXTS]
    assert max(max(ids, default=0) for ids in facts["texts"]) < FIRST
    processor = code.images.KimiVLImageProcessor(
        patch_size=PATCH, pad_input=True, in_token_limit=MAX_PATCHES,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    pictures = [Image.fromarray(random_image(w, h, i)) for i, (w, h) in enumerate(SIZES)]
    made = processor.preprocess(pictures)
    pixels = torch.as_tensor(np.asarray(made["pixel_values"]), dtype=torch.float32)
    grid = torch.as_tensor(np.asarray(made["image_grid_hws"]), dtype=torch.int64)
    levels = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()
    recorded = {
        "levels": levels,
        "grid": grid.numpy().astype(np.int32),
        "features": features(code, pixels, grid),
        "sizes": grids(code),
    }
    save_file(
        {n: np.ascontiguousarray(t) for n, t in recorded.items()}, folder / "kimi_vl.safetensors"
    )
    (folder / "kimi_vl.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
