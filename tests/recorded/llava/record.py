"""Records what LLaVA's official code makes of conversations and of image sizes.

    PYTHONPATH=REPOSITORY python tests/recorded/llava/record.py LLAVA NEXT

LLAVA and NEXT are checkouts of github.com/haotian-liu/LLaVA and github.com/LLaVA-VL/LLaVA-NeXT;
transformers 4.37.2 and sentencepiece must be installed. Writes llava.json: prompts, their ids with
-200 for an image, and token counts of `llava_cases.sizes()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaTokenizer,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
)

from tests.helpers.llava_checkpoint import write_tokenizer
from tests.parity.llava_cases import ANYRES, CONVERSATIONS, ONEVISION, TURNS, sizes, spoken

LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set c = '<|begin_of_text|>' + c %}"
    "{% endif %}{{ c }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SYSTEMS = {
    "chatml_direct": "<|im_start|>system\n",
    "qwen_1_5": "<|im_start|>system\n",
}


def load(checkout: Path, name: str) -> Any:
    """A module of the official package without the package, whose import needs much more."""
    path = checkout / "llava" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{checkout.name}_{name.replace('/', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(checkout: Path) -> None:
    """The official package's names that its modules import and these functions do not use."""
    for name in ("llava", "llava.model", "llava.constants", "llava.utils", "llava.mm_utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    constants: Any = sys.modules["llava.constants"]
    exec((checkout / "llava" / "constants.py").read_text(), vars(constants))


def tokenizer_of(folder: Path, kind: str) -> Any:
    write_tokenizer(folder, kind)
    if kind == "1.6-mistral":  # the only one that the official code opens with the fast class
        return LlamaTokenizerFast.from_pretrained(folder)
    if (folder / "tokenizer.model").exists():
        return LlamaTokenizer.from_pretrained(folder)
    file = str(folder / "tokenizer.json")
    if kind == "next-llama3":
        # NOTE: without a bos_token. Where the tokenizer adds one the official code has two of it,
        # the template's being the other; in training there was one.
        return PreTrainedTokenizerFast(tokenizer_file=file, chat_template=LLAMA_3)
    return PreTrainedTokenizerFast(tokenizer_file=file)


def prompts(llava: Path, following: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, name in CONVERSATIONS.items():
        checkout = following if kind.startswith(("next", "one")) else llava
        conversations, tools = load(checkout, "conversation"), load(checkout, "mm_utils")
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = tokenizer_of(Path(folder), kind)
            for case, turns in TURNS.items():
                talk = conversations.conv_templates[name].copy()
                talk.tokenizer = tokenizer
                talk.messages = []
                for turn in turns:
                    text = spoken(turn.parts)
                    if turn.role == "system":
                        talk.system = SYSTEMS.get(name, "") + text
                    else:
                        talk.append_message(talk.roles[turn.role == "assistant"], text)
                if name != "mistral_instruct" and name != "llava_llama_3":
                    talk.append_message(talk.roles[1], None)
                prompt = talk.get_prompt()
                ids = tools.tokenizer_image_token(prompt, tokenizer)
                found.setdefault(kind, {})[case] = {"text": prompt, "ids": ids}
    return found


def unpadder(checkout: Path) -> Any:
    """The official function alone: its module imports the whole model."""
    text = (checkout / "llava" / "model" / "llava_arch.py").read_text()
    start = text.index("def unpad_image")
    scope: dict[str, Any] = {}
    exec(text[start : text.index("\nclass ", start)], scope)
    return scope["unpad_image"]


def count(checkout: Path, size: tuple[int, int], pairs: Any, side: int, most: int | None) -> int:
    tools, unit = load(checkout, "mm_utils"), side // 14
    width, height = tools.get_anyres_image_grid_shape(size, pairs, side)
    features = torch.empty(1, unit * height, unit * width, device="meta")
    _, rows, columns = unpadder(checkout)(features, size).shape
    if most is not None:
        times = math.sqrt(rows * columns / (most * unit**2))
        if times > 1.1:
            rows, columns = int(rows // times), int(columns // times)
    return unit**2 + rows * (columns + 1)


def counts(checkout: Path, pairs: Any, side: int, most: int | None) -> dict[str, Any]:
    found = [count(checkout, size, pairs, side, most) for size in sizes()]
    text = json.dumps(found).encode()
    return {"first": found[:50], "sum": sum(found), "sha256": hashlib.sha256(text).hexdigest()}


def main() -> None:
    llava, following = Path(sys.argv[1]), Path(sys.argv[2])
    stand_in(llava)
    recorded = {
        "prompts": prompts(llava, following),
        "counts": {
            "1.6": counts(llava, ANYRES, 336, None),
            "onevision": counts(following, ONEVISION, 384, 9),
        },
    }
    path = Path(__file__).with_name("llava.json")
    path.write_text(json.dumps(recorded, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
