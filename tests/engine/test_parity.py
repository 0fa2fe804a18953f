"""The engine against transformers' generate, and against itself in every other arrangement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.rows import Request
from tests.engine.engine_bench import PIXELS, Bench, outputs, questions


def generate(model: Any, processor: Any, request: Request, **options: Any) -> tuple[int, ...]:
    """transformers' greedy answer to the same tokens and pixels, stop token cut off."""
    tokens = torch.from_numpy(request.tokens.astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["mm_token_type_ids"] = (tokens == model.config.image_token_id).int()
    if request.images:
        pixels = [PIXELS[i.image.digest] for i in request.images]
        inputs |= dict(processor(images=pixels, return_tensors="pt"))
    stops = list(request.sampling.stop_token_ids)
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=request.sampling.max_new_tokens,
        eos_token_id=stops, pad_token_id=stops[0], **options,
    )  # fmt: skip
    found = out[0, tokens.shape[1] :].tolist()
    return tuple(found[:-1] if found and found[-1] in stops else found)


@pytest.fixture
def reference(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = type(model.generation_config)()
    return model, Qwen2VLImageProcessorPil.from_pretrained(folder)


def test_greedy_tokens_equal_transformers(folder: Path, reference: tuple[Any, Any]) -> None:
    bench = Bench.open(folder)
    requests = questions(bench)
    found = outputs(bench.run(requests))
    assert found == {r.key: generate(*reference, r) for r in requests}


def test_repetition_penalty_equals_transformers(folder: Path, reference: tuple[Any, Any]) -> None:
    bench = Bench.open(folder)
    requests = questions(bench, rows=3, repetition_penalty=1.3)
    found = outputs(bench.run(requests))
    assert found == {r.key: generate(*reference, r, repetition_penalty=1.3) for r in requests}


ARRANGEMENTS = [
    {"overlap": False},
    {"decode_slots": 1},
    {"decode_slots": 32, "prefill_tokens": 4096},
    {"share_images": False},
    {"share_prefix": False},
    {"share_images": False, "share_prefix": False, "overlap": False, "prefill_tokens": 64},
]


@pytest.mark.parametrize("engine", ARRANGEMENTS, ids=lambda e: "-".join(f"{k}={e[k]}" for k in e))
def test_arrangements_give_the_same_tokens(folder: Path, engine: dict[str, Any]) -> None:
    plain, other = Bench.open(folder), Bench.open(folder, **engine)
    assert outputs(other.run(questions(other))) == outputs(plain.run(questions(plain)))


def test_sampled_tokens_do_not_depend_on_the_batch(folder: Path) -> None:
    drawn = []
    for engine in ({"decode_slots": 1}, {"decode_slots": 8}, {"share_images": False}):
        bench = Bench.open(folder, **engine)
        requests = [
            r
            for seed in (1, 2)
            for r in questions(bench, rows=2, temperature=0.9, top_p=0.9, top_k=40, seed=seed)
        ]
        merged = {}
        for requests_of_seed in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
            seed = requests_of_seed[0].sampling.seed
            found = outputs(bench.run(requests_of_seed))
            merged |= {(seed, key): tokens for key, tokens in found.items()}
        drawn.append(merged)
    assert drawn[0] == drawn[1] == drawn[2]
    keys = [key for seed, key in drawn[0] if seed == 1]
    assert any(drawn[0][1, key] != drawn[0][2, key] for key in keys)
