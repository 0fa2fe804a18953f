"""Records what mistral-common makes of conversations and images, with its Pixtral tokenizers.

    PYTHONPATH=REPOSITORY python tests/recorded/pixtral/record.py

mistral-common (1.9 or later), sentencepiece and opencv-python-headless must be installed. Writes
pixtral.json (prompts to ids, token counts of `pixtral_cases.sizes()`) and pixtral.safetensors (the
pixels of two images).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    ImageChunk,
    SystemMessage,
    TextChunk,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.image import (
    ImageConfig,
    ImageEncoder,
    SpecialImageIDs,
    transform_image,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from safetensors.numpy import save_file

from pipeline.rows import Turn
from tests.helpers.parity import random_image
from tests.helpers.pixtral_checkpoint import PATCH, write_mistral
from tests.parity.pixtral_cases import IMAGES, TURNS, sizes

PIXELS = {"smaller": ((200, 130), (64, 44)), "larger": ((21, 13), (24, 16))}


def chunks(turn: Turn) -> Any:
    if len(turn.parts) == 1 and isinstance(turn.parts[0], str):
        return turn.parts[0]
    return [
        TextChunk(text=part)
        if isinstance(part, str)
        else ImageChunk(image=Image.fromarray(random_image(*IMAGES[part])))
        for part in turn.parts
    ]


def message(turn: Turn) -> Any:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    return kinds[turn.role](content=chunks(turn))


def prompts(large: bool) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        write_mistral(Path(folder), large=large)
        name = "tokenizer.model.v7m1" if large else "tekken.json"
        tokenizer = MistralTokenizer.from_file(str(Path(folder) / name))
        encoder = tokenizer.instruct_tokenizer.image_encoder
        # A SentencePiece file has no place for the patch size.
        encoder.image_config.image_patch_size, encoder.image_config.max_image_size = PATCH, 64
        found = {}
        for name, turns in TURNS.items():
            request: Any = ChatCompletionRequest(messages=[message(turn) for turn in turns])
            found[name] = tokenizer.encode_chat_completion(request).tokens
        return found


def counts() -> dict[str, Any]:
    encoder = ImageEncoder(ImageConfig(16, 1024), SpecialImageIDs(10, 12, 13))
    found = []
    for size in sizes():
        columns, rows = encoder._image_to_num_tokens(Image.new("1", size))
        found.append((columns + 1) * rows)
    text = json.dumps(found).encode()
    return {"first": found[:50], "sum": sum(found), "sha256": hashlib.sha256(text).hexdigest()}


def main() -> None:
    recorded = {
        "prompts": {"12b": prompts(False), "large": prompts(True)},
        "counts": counts(),
    }
    folder = Path(__file__).parent
    (folder / "pixtral.json").write_text(json.dumps(recorded, indent=1))
    pixels = {
        name: transform_image(Image.fromarray(random_image(*size)), new).astype(np.float32)
        for name, (size, new) in PIXELS.items()
    }
    save_file(
        {n: np.ascontiguousarray(p) for n, p in pixels.items()}, folder / "pixtral.safetensors"
    )


if __name__ == "__main__":
    main()
