"""Sliding windows in the engine: prompts longer than the window, in every arrangement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.engine.engine_bench import Bench, outputs, questions
from tests.engine.test_parity import ARRANGEMENTS, generate
from tests.helpers.checkpoints import write_json, write_qwen2_vl

WINDOW = 18  # tokens; the shortest prompt with an image is longer


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_qwen2_vl(tmp_path_factory.mktemp("windowed") / "qwen2_vl")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def truth(windowed: Path) -> dict[Any, tuple[int, ...]]:
    model: Any = AutoModelForImageTextToText.from_pretrained(windowed, dtype=torch.float32).eval()
    model.generation_config = type(model.generation_config)()
    assert model.config.text_config.layer_types.count("sliding_attention") == 2
    processor = Qwen2VLImageProcessorPil.from_pretrained(windowed)
    return {r.key: generate(model, processor, r) for r in questions(Bench.open(windowed))}


def test_the_window_matters(folders: dict[str, Path], truth: dict[Any, tuple[int, ...]]) -> None:
    full = Bench.open(folders["qwen2_vl"])
    assert all(len(r.tokens) > WINDOW for r in questions(full) if r.images)
    assert outputs(full.run(questions(full))) != truth


@pytest.mark.parametrize("engine", [{}, *ARRANGEMENTS], ids=str)
def test_tokens_equal_transformers(
    windowed: Path, truth: dict[Any, tuple[int, ...]], engine: dict[str, Any]
) -> None:
    bench = Bench.open(windowed, **engine)
    assert outputs(bench.run(questions(bench))) == truth
