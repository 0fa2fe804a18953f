"""transformers' own class and `generate` in static, left-padded batches: the plain way.

Decodes, processes and tokenises as its processor does; knows nothing of our engine.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.models.checkpoint import Checkpoint
from pipeline.settings import ModelSettings


@dataclass(frozen=True)
class Asked:
    """One answer wanted: its key, the encoded image, the question, and its length at most."""

    key: tuple[int, str]
    image: bytes
    question: str
    limit: int


class Peer:
    """A Qwen2-VL or Qwen2.5-VL checkpoint in transformers."""

    def __init__(self, settings: ModelSettings) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

        checkpoint = Checkpoint.open(settings)
        known = checkpoint.preprocessor_config.items()
        self._torch = torch
        self._processor = pil.Qwen2VLImageProcessorPil(
            **{k: v for k, v in known if not k.endswith(("_class", "_type"))}
        )
        self._tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        self._model = AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder, dtype=torch.float32
        ).eval()
        self._image_token = checkpoint.config["image_token_id"]
        eos = self._model.generation_config.eos_token_id
        self._eos = [eos] if isinstance(eos, int) else list(eos)

    def answer(self, asked: Sequence[Asked], batch: int) -> dict[tuple[int, str], str]:
        """Greedy answers; rows that share a prompt's name share batches."""
        found: dict[tuple[int, str], str] = {}
        for _, group in groupby(asked, key=lambda one: one.key[1]):
            rows = list(group)
            for start in range(0, len(rows), batch):
                found |= self._batch(rows[start : start + batch])
        return found

    def _batch(self, rows: Sequence[Asked]) -> dict[tuple[int, str], str]:
        from PIL import Image

        torch = self._torch
        images = [Image.open(io.BytesIO(row.image)).convert("RGB") for row in rows]
        features = self._processor(images=images, return_tensors="pt")
        counts = (features["image_grid_thw"].prod(-1) // 4).tolist()
        texts = [expanded(row.question, n) for row, n in zip(rows, counts, strict=True)]
        tokens, mask = self._padded([e.ids for e in self._tokenizer.encode_batch(texts)])
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                mm_token_type_ids=(tokens == self._image_token).int(),
                max_new_tokens=rows[0].limit,
                do_sample=False,
                eos_token_id=self._eos,
                pad_token_id=self._eos[0],
                **features,
            )
        new = out[:, tokens.shape[1] :].tolist()
        texts = self._tokenizer.decode_batch(new, skip_special_tokens=True)
        return {row.key: text for row, text in zip(rows, texts, strict=True)}

    def _padded(self, rows: list[list[int]]) -> tuple[Any, Any]:
        torch = self._torch
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self._eos[0])
        mask = torch.zeros_like(tokens)
        for i, ids in enumerate(rows):
            tokens[i, longest - len(ids) :] = torch.tensor(ids)
            mask[i, longest - len(ids) :] = 1
        return tokens, mask


def expanded(question: str, num_tokens: int) -> str:
    """The conversation as text, with as many image tokens as the picture needs."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
