"""Records what the official code of MiniCPM-V 2.6 makes of the small random checkpoint.

    VLM_BATCH_OFFICIAL_MINICPM_V=CODE PYTHONPATH=. python tests/recorded/minicpm_v/record.py FOLDER

CODE holds the repository's Python files (`modeling_minicpmv.py` and those beside it), written for
transformers 4.44.2; they are imported, run and never copied. Writes minicpm_v.json (prompt ids,
greedy tokens, patch grids, digests of the pixels, token counts) and minicpm_v.safetensors (logits).
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import json
import os
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.minicpm_checkpoint import write_minicpm_v
from tests.parity.minicpm_cases import CASES, Case, pixels_of, random_sizes

NUM_TOKENS = 8


class Official:
    """The repository's model and processor on the checkpoint in `folder`."""

    modeling_file, processing_file = "modeling_minicpmv", "processing_minicpmv"
    prefix = "MiniCPMV"
    markers: typing.ClassVar = {
        "im_start_id": "<image>",
        "im_end_id": "</image>",
        "slice_start_id": "<slice>",
        "slice_end_id": "</slice>",
    }

    def __init__(self, code: Path, folder: Path) -> None:
        # The resampler's annotations come from names that older torch files exported; the
        # files import torchvision and torchaudio and use neither here.
        for name in ("Any", "Callable", "List", "Optional", "Tuple", "Union"):
            setattr(builtins, name, getattr(typing, name))
        for name in ("torchaudio", "torchvision"):
            sys.modules.setdefault(name, types.ModuleType(name))
        package = types.ModuleType("official_minicpm")
        package.__path__ = [str(code)]
        sys.modules["official_minicpm"] = package
        load = lambda name: importlib.import_module(f"official_minicpm.{name}")  # noqa: E731
        self.images = load("image_processing_minicpmv")
        self.processing = load(self.processing_file)
        self.configuration = load("configuration_minicpm")
        self.modeling = load(self.modeling_file)
        self.folder = folder
        self.tokenizer = self._tokenizer()
        self.processor = self._processor()
        self.model = self._model()

    def _tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        for name, token in self.markers.items():
            setattr(tokenizer, name, tokenizer.convert_tokens_to_ids(token))
        return tokenizer

    def _processor(self) -> Any:
        settings = json.loads((self.folder / "preprocessor_config.json").read_text())
        images = self.images.MiniCPMVImageProcessor(**settings)
        # NOTE: the constructor insists on classes of its own for the parts.
        processor = object.__new__(getattr(self.processing, f"{self.prefix}Processor"))
        processor.image_processor, processor.tokenizer = images, self.tokenizer
        processor.version = images.version
        return processor

    def _model(self) -> Any:
        values = json.loads((self.folder / "config.json").read_text())
        model = object.__new__(getattr(self.modeling, self.prefix))
        torch.nn.Module.__init__(model)
        model.config = self._config(values)
        text = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
        text["tie_word_embeddings"] = False
        model.llm = Qwen2ForCausalLM(Qwen2Config(**text))
        model.vpm = model.init_vision_module()
        width = model.llm.config.hidden_size
        model.resampler = model.init_resampler(width, model.vpm.embed_dim)
        self._add_parts(model)
        tensors = load_file(self.folder / "model.safetensors")
        tensors = {name: t for name, t in tensors.items() if not name.startswith("tts.")}
        left = model.load_state_dict(tensors, strict=False)
        assert not left.unexpected_keys, left
        buffers = ("pos_embed", "position_ids")
        assert all(name.endswith(buffers) for name in left.missing_keys), left
        return model.float().eval()

    def _config(self, values: dict[str, Any]) -> Any:
        config = self.configuration.MiniCPMVConfig(**values)
        config._attn_implementation = "eager"
        return config

    def _add_parts(self, model: Any) -> None:
        """What a subclass has besides."""

    def inputs(self, case: Case) -> Any:
        """As `chat` does: contents joined by newlines, the template, the processor."""
        messages, images = [], []
        for role, parts in case.turns:
            texts = []
            for part in parts:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    images.append(Image.fromarray(pixels_of(part)))
                    texts.append("(<image>./</image>)")
            messages.append({"role": role, "content": "\n".join(texts)})
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.processor([prompt], [images], return_tensors="pt")

    def embed(self, inputs: Any) -> torch.Tensor:
        return self.model.get_vllm_embedding(dict(inputs))[0]

    def run(self, case: Case) -> tuple[dict[str, Any], torch.Tensor]:
        inputs = self.inputs(case)
        ids = inputs["input_ids"]
        embeds = self.embed(inputs)
        logits = self.model.llm(inputs_embeds=embeds).logits[0]
        tokens = self.model.llm.generate(
            inputs_embeds=embeds, do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1,
            pad_token_id=0, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        )  # fmt: skip
        facts = {
            "ids": ids[0].tolist(),
            "tokens": tokens[0].tolist(),
            "grids": [grid.tolist() for grid in inputs["tgt_sizes"][0]],
            "pixels": [digest(pixels) for pixels in inputs["pixel_values"][0]],
        }
        return facts, logits[::7, ::3]

    def counts(self) -> list[int]:
        """Tokens of an image's block for random sizes, by the processor's own placeholders."""
        images = self.processor.image_processor
        texts = [images.get_slice_image_placeholder(size, 0) for size in random_sizes()]
        return [len(self.tokenizer.encode(text)) for text in texts]


def digest(pixels: torch.Tensor) -> str:
    """Of float32 values, to the bit."""
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


@torch.inference_mode()
def main(target: Path) -> None:
    torch.set_num_threads(1)
    code = Path(os.environ["VLM_BATCH_OFFICIAL_MINICPM_V"]).resolve()
    facts: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        official = Official(code, write_minicpm_v(Path(scratch)))
        for name, case in CASES.items():
            facts[name], logits = official.run(case)
            tensors[name] = logits.contiguous()
        facts["counts"] = official.counts()
    (target / "minicpm_v.json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(tensors, target / "minicpm_v.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
