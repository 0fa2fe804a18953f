"""Records what Janus's official code makes of the small checkpoint of `janus_checkpoint`.

    PYTHONPATH=REPOSITORY:JANUS python tests/recorded/janus/record.py FOLDER

JANUS is a checkout of github.com/deepseek-ai/Janus; transformers 4.38.2, timm, einops and
torchvision must be installed. Writes janus.json (prompts to ids) and janus.safetensors (pixels,
logits, greedy tokens). `attrdict` no longer works on today's Python, so a few lines stand for it.
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

from tests.helpers.checkpoints import random_tensors
from tests.helpers.janus_checkpoint import (
    DEPTH,
    PATCH,
    TOWER_HEADS,
    WIDTH,
    original_config,
    original_shapes,
    write_janus,
)
from tests.helpers.parity import random_image

IMAGE = "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "text": [(USER, "How many things are there?"), (ASSISTANT, "")],
    "image": [(USER, f"{IMAGE}\nDescribe this image."), (ASSISTANT, "")],
    "two images": [(USER, f"{IMAGE}\n{IMAGE}\nWhich one?"), (ASSISTANT, "")],
    "between": [(USER, f"first {IMAGE}\nthen {IMAGE}\n say why "), (ASSISTANT, "")],
    "turns": [
        (USER, f"{IMAGE}\n  What is it?\n"),
        (ASSISTANT, " A red square. "),
        (USER, "And here? naïve 東京"),
        (ASSISTANT, ""),
    ],
}
SYSTEMS = {"text": "You count things.", "image": None, "turns": "Be brief\nand kind."}
SIZES = [(64, 48), (33, 90), (48, 48), (301, 117), (7, 5), (400, 3)]
QUESTION, PICTURES = "between", [(64, 48), (33, 90)]
NUM_TOKENS = 8


class AttrDict(dict):
    """The mapping that the official code imports."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return AttrDict(value) if isinstance(value, dict) else value


def official() -> Any:
    sys.modules.setdefault("attrdict", types.ModuleType("attrdict"))
    sys.modules["attrdict"].AttrDict = AttrDict  # type: ignore[attr-defined]
    from janus.models import MultiModalityCausalLM, VLChatProcessor, VLMImageProcessor, siglip_vit
    from janus.models.modeling_vlm import MultiModalityConfig
    from transformers import LlamaTokenizerFast

    siglip_vit.SigLIP_MODEL_CONFIG["siglip_large_patch16_384"] |= {
        "width": WIDTH,
        "layers": DEPTH,
        "heads": TOWER_HEADS,
        "patch_size": PATCH,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_janus(Path(folder))
        settings = json.loads((path / "processor_config.json").read_text())
        pixels = json.loads((path / "preprocessor_config.json").read_text())
        tokenizer = LlamaTokenizerFast.from_pretrained(path)
    names = ("image_size", "min_size", "image_mean", "image_std")
    images = VLMImageProcessor(**{name: pixels[name] for name in names})
    settings = {k: v for k, v in settings.items() if k not in ("processor_class", "image_tag")}
    processor = VLChatProcessor(images, tokenizer, **settings)
    model = MultiModalityCausalLM(MultiModalityConfig(**original_config())).eval()
    tensors = {n: torch.from_numpy(t) for n, t in random_tensors(original_shapes(), 0).items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith("gen_")}
    told = model.load_state_dict(tensors, strict=False)
    assert not told.unexpected_keys
    assert all(n.startswith("gen_") or ".attn_pool." in n for n in told.missing_keys)
    return processor, model


def ids_of(processor: Any, name: str) -> list[int]:
    processor.system_prompt = SYSTEMS.get(name) or type(processor).system_prompt
    turns = [{"role": role, "content": text} for role, text in PROMPTS[name]]
    text = processor.apply_sft_template_for_multi_turn_prompts(
        turns, processor.sft_format, processor.system_prompt
    )
    ids = torch.LongTensor(processor.tokenizer.encode(text))
    where = (ids == processor.image_id).nonzero()
    return processor.add_image_token(where, ids)[0].tolist()


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [Image.fromarray(random_image(w, h, seed)) for seed, (w, h) in enumerate(sizes)]


@torch.inference_mode()
def answer(processor: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the last rows of one prompt, and the greedy tokens that follow it."""
    ids = torch.tensor(ids_of(processor, QUESTION))
    pixels = processor.image_processor(pictures(PICTURES), return_tensors="pt").pixel_values
    mask = torch.ones(1, len(PICTURES), processor.num_image_tokens, dtype=torch.bool)
    seen = (ids == processor.image_id)[None]
    x = model.prepare_inputs_embeds(ids[None].clone(), pixels[None], seen, mask)
    logits = model.language_model(inputs_embeds=x).logits[0]
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        row = model.language_model(inputs_embeds=x).logits[0, -1]
        tokens.append(int(row.argmax()))
        new = model.language_model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        x = torch.cat([x, new], 1)
    return logits[-NUM_TOKENS:].numpy(), np.array(tokens, np.int32)


def main(folder: Path) -> None:
    processor, model = official()
    ids = {name: ids_of(processor, name) for name in PROMPTS}
    (folder / "janus.json").write_text(json.dumps(ids) + "\n")
    made = processor.image_processor(pictures(SIZES), return_tensors="np").pixel_values
    # The pixels are exact multiples of 1/255 once the norm is undone: bytes say it all.
    levels = np.rint((made * 0.5 + 0.5) * 255).astype(np.uint8)
    assert np.abs((levels / 255 - 0.5) / 0.5 - made).max() < 1e-6
    logits, tokens = answer(processor, model)
    recorded = {"levels": levels, "logits": logits, "tokens": tokens}
    save_file(
        {n: np.ascontiguousarray(t) for n, t in recorded.items()}, folder / "janus.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
