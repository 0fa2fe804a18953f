"""The labeller against transformers' own classes on a CPU: the same texts? and how fast?

Both see the same rows in one process, first one then the other, greedy, in float32. For Qwen2-VL
and Qwen2.5-VL checkpoints, the model that ships among them.
"""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np

from pipeline.rows import Answer, ImageRef, Row, ShardWork
from pipeline.settings import (
    EngineSettings,
    GenerationSettings,
    InputSettings,
    LabelSettings,
    ModelSettings,
    PromptSettings,
)
from scripts.bench import workloads

MAX_NEW_TOKENS = 48


def run(model: str, num_rows: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Label the rows with both; how many texts are equal, and both speeds."""
    images = workloads.make("mixed", num_rows, seed).images
    chosen = LabelSettings(
        model=ModelSettings(id=model, dtype="float32", **options),
        input=InputSettings(path="memory"),
        prompts={"answer": PromptSettings(text="Describe the image.")},
        generation=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0),
        engine=EngineSettings(device="cpu"),
    )
    rows = [Row(str(i), i, {}, (ImageRef(data=data),)) for i, data in enumerate(images)]
    ours, our_seconds = _ours(chosen, rows)
    theirs, their_seconds = _theirs(chosen, rows)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return {
        "rows": num_rows,
        "equal": num_rows - len(differing),
        "differing": differing[:20],
        "rows_per_s": round(num_rows / our_seconds, 3),
        "transformers_rows_per_s": round(num_rows / their_seconds, 3),
    }


def _ours(chosen: LabelSettings, rows: list[Row]) -> tuple[list[str | None], float]:
    from pipeline.labeller import Labeller

    labeller = Labeller(chosen)
    try:
        list(labeller.label([ShardWork("warmup", rows[:2])]))
        started = time.perf_counter()
        answers: list[Answer] = list(labeller.label([ShardWork("check", rows)]))
        seconds = time.perf_counter() - started
    finally:
        labeller.close()
    answers.sort(key=lambda answer: answer.key.row)
    return [answer.text for answer in answers], seconds


def _theirs(chosen: LabelSettings, rows: list[Row]) -> tuple[list[str], float]:
    import torch
    from transformers import AutoModelForImageTextToText

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.registry import family_for
    from pipeline.prepare import Preparer, Unstored
    from pipeline.rows import Request
    from pipeline.tokenizer import Tokenizer

    checkpoint = Checkpoint.open(chosen.model)
    tokenizer = Tokenizer(checkpoint)
    family = family_for(checkpoint, chosen.model)
    preparer = Preparer(chosen, family, tokenizer, Unstored())
    processor = _image_processor(checkpoint.preprocessor_config)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=torch.float32)
    texts = []
    started = time.perf_counter()
    for row in rows:
        (request,) = preparer.prepare("check", row)
        assert isinstance(request, Request)
        ids = _generate(model.eval(), processor, request, row.images[0].data or b"", family)
        texts.append(tokenizer.decode(ids))
    return texts, time.perf_counter() - started


def _image_processor(settings: dict[str, Any]) -> Any:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

    known = {k: v for k, v in settings.items() if not k.endswith(("_class", "_type"))}
    return pil.Qwen2VLImageProcessorPil(**known)


def _generate(model: Any, processor: Any, request: Any, data: bytes, family: Any) -> list[int]:
    import torch
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    features = processor(images=[image], return_tensors="pt")
    tokens = torch.from_numpy(np.asarray(request.tokens, np.int64))[None]
    with torch.inference_mode():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == family.image_token_id).int(),
            pixel_values=features["pixel_values"],
            image_grid_thw=features["image_grid_thw"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(family.eos_token_ids),
            pad_token_id=family.eos_token_ids[0],
        )
    return out[0, tokens.shape[1] :].tolist()
