"""Records what DeepSeek-VL2's official code makes of the small checkpoints of its helper.

    PYTHONPATH=REPOSITORY:DEEPSEEK-VL2 python tests/recorded/deepseek_vl2/record.py FOLDER

DEEPSEEK-VL2 is a checkout of github.com/deepseek-ai/DeepSeek-VL2; transformers 4.38.2, timm, einops
and torchvision must be installed. Writes deepseek_vl2.json (prompts to ids) and
deepseek_vl2.safetensors (canvases and token counts of random sizes, pixels, logits, greedy tokens).
xformers' attention, which needs a GPU, is torch's here.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch.nn import functional

from tests.helpers.checkpoints import random_tensors
from tests.helpers.deepseek_vl2_checkpoint import (
    LANGUAGES,
    SPECIAL,
    config_of,
    shapes_of,
    write_deepseek_vl2,
)
from tests.helpers.parity import random_image

IMAGE = "<image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "text": [("system", " You count things.\n"), (USER, "How many things are there?")],
    "image": [(USER, f"{IMAGE}\nDescribe this image.")],
    "two images": [(USER, f"{IMAGE}\n{IMAGE}\nWhich one?")],
    "three images": [(USER, f"a {IMAGE}\nb {IMAGE}\n{IMAGE}\n c")],
    "grounding": [(USER, f"{IMAGE}\n<|grounding|>Where is <|ref|>the house<|/ref|>?")],
    "between": [(USER, f"first {IMAGE}\nthen {IMAGE}\n say why ")],
    "turns": [
        (USER, f"{IMAGE}\n  What is it?\n"),
        (ASSISTANT, " A red square. "),
        (USER, "And here? naïve 東京"),
    ],
}
SIZES = [(64, 48), (33, 90), (150, 40), (7, 5)]
QUESTION, PICTURES = "between", [(64, 48), (33, 90)]
NUM_TOKENS = 8
NUM_SIZES = 2000


def official_classes() -> Any:
    operations = types.ModuleType("xformers.ops")

    def attention(q: Any, k: Any, v: Any, p: float = 0.0) -> Any:
        turned = (t.transpose(1, 2) for t in (q, k, v))
        return functional.scaled_dot_product_attention(*turned).transpose(1, 2)

    operations.memory_efficient_attention = attention  # type: ignore[attr-defined]
    sys.modules["xformers"] = types.ModuleType("xformers")
    sys.modules["xformers.ops"] = operations
    from deepseek_vl2.models import (
        modeling_deepseek_vl_v2,
        processing_deepseek_vl_v2,
    )

    return modeling_deepseek_vl_v2, processing_deepseek_vl_v2


def official_processor(special: tuple[str, ...] = SPECIAL, **changes: Any) -> Any:
    from transformers import LlamaTokenizerFast

    _, code = official_classes()
    with tempfile.TemporaryDirectory() as folder:
        path = write_deepseek_vl2(Path(folder), "small", special)
        settings = json.loads((path / "processor_config.json").read_text()) | changes
        tokenizer = LlamaTokenizerFast.from_pretrained(path)
    settings.pop("processor_class")
    settings["candidate_resolutions"] = tuple(map(tuple, settings["candidate_resolutions"]))
    return code.DeepseekVLV2Processor(tokenizer, **settings)


def official_model(kind: str) -> Any:
    code, _ = official_classes()
    config = code.DeepseekVLV2Config(**config_of(kind))
    model = code.DeepseekVLV2ForCausalLM(config).eval()
    tensors = {n: torch.from_numpy(t) for n, t in random_tensors(shapes_of(kind), 0).items()}
    told = model.load_state_dict(tensors, strict=False)
    assert not told.unexpected_keys
    assert all("attn_pool" in name for name in told.missing_keys)
    return model


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [Image.fromarray(random_image(w, h, seed)) for seed, (w, h) in enumerate(sizes)]


def processed(processor: Any, name: str, sizes: list[tuple[int, int]]) -> Any:
    turns = [{"role": role, "content": text} for role, text in PROMPTS[name]]
    turns.append({"role": ASSISTANT, "content": ""})
    return processor.process_one(conversations=turns, images=pictures(sizes))


def counted(processor: Any) -> np.ndarray:
    """Canvas and tokens of random sizes, by the official code on images that hold no pixel."""
    _, code = official_classes()

    class Blank:
        size = (0, 0)

        def crop(self, box: Any) -> Blank:
            return self

    code.ImageOps = types.SimpleNamespace(pad=lambda image, size, color: Blank())
    processor.image_transform = lambda view: None
    processor.image_transform.mean = (0.5, 0.5, 0.5)
    found = []
    for width, height in random_sizes():
        blank = Blank()
        blank.size = (width, height)
        _, _, _, grids, counts = processor.tokenize_with_images(IMAGE, [blank], False, False, True)
        found.append([*grids[0], counts[0]])
    return np.array(found, np.int32)


def random_sizes() -> list[tuple[int, int]]:
    """Sides between 1 and 8,000 pixels, all scales alike."""
    rng = np.random.default_rng(11)
    sides = np.exp(rng.uniform(0, np.log(8000), (NUM_SIZES, 2))).astype(int)
    return [(int(w), int(h)) for w, h in sides]


@torch.inference_mode()
def answer(processor: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the last rows of one prompt, and the greedy tokens that follow it."""
    made = processed(processor, QUESTION, PICTURES)
    x = model.prepare_inputs_embeds(
        made.input_ids[None], made.images[None], made.images_seq_mask[None],
        made.images_spatial_crop[None],
    )  # fmt: skip
    logits = model.language(inputs_embeds=x, use_cache=False).logits[0]
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        row = model.language(inputs_embeds=x, use_cache=False).logits[0, -1]
        tokens.append(int(row.argmax()))
        new = model.language.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        x = torch.cat([x, new], 1)
    return logits[-NUM_TOKENS:].numpy(), np.array(tokens, np.int32)


def main(folder: Path) -> None:
    processor = official_processor()
    ids = {}
    for name, turns in PROMPTS.items():
        count = sum(text.count(IMAGE) for _, text in turns)
        ids[name] = processed(processor, name, [(64, 48)] * count).input_ids.tolist()
    bare = official_processor(SPECIAL[:2])
    ids["tokens added"] = processed(bare, "image", [(64, 48)]).input_ids.tolist()
    recorded = {}
    for number, picture in enumerate(pictures(SIZES)):
        made = processor.tokenize_with_images(IMAGE, [picture], False, False)[1]
        levels = (torch.stack(made) * 0.5 + 0.5) * 255
        recorded[f"levels.{number}"] = levels.round().to(torch.uint8).numpy()
    for kind in LANGUAGES:
        logits, tokens = answer(processor, official_model(kind))
        recorded |= {f"{kind}.logits": logits, f"{kind}.tokens": tokens}
    real = [[384 * w, 384 * h] for w in range(1, 10) for h in range(1, 10) if w * h <= 9]
    recorded["counts"] = counted(official_processor(candidate_resolutions=real))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in recorded.items()},
        folder / "deepseek_vl2.safetensors",
    )
    (folder / "deepseek_vl2.json").write_text(json.dumps(ids) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
