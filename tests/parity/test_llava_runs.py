"""LLaVA through the engine, against transformers' generate, and through `vlm-batch run`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.engine.engine_bench import PIXELS, Bench, outputs, picture, questions
from tests.helpers.label_run import label_run, start_run
from tests.helpers.llava_checkpoint import image_id, write_original, write_twin
from tests.parity.test_parity_llava import official_pixels

KINDS = ("1.5", "1.6", "onevision")
RUNS = {"1.5": "vicuna_v1.1", "next-qwen": "chatml-llava", "onevision": "chatml-llava"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("llava")


@cache
def _folder(folders: Path, kind: str) -> Path:
    return write_original(folders / kind, kind)


def asked(bench: Bench) -> list[Any]:
    """The usual rows, and one whose two questions share two images."""
    made = questions(bench, rows=3, stop_token_ids=(-1,), max_new_tokens=8)
    pair = [picture(5, 90, 50), picture(6, 50, 90)]
    for number, text in enumerate(("Which one?", "Compare the two, in one word.")):
        options: Any = {"stop_token_ids": (-1,), "max_new_tokens": 8}
        made.append(bench.request(50, text, pair, f"p{number}", **options))
    return made


@cache
def truth(folders: Path, kind: str) -> dict[Any, tuple[int, ...]]:
    """transformers' greedy answers to the same tokens and pixels, each alone."""
    twin = write_twin(folders / f"{kind}-twin", kind)
    model: Any = AutoModelForImageTextToText.from_pretrained(twin, dtype=torch.float32).eval()
    found = {}
    for r in asked(Bench.open(_folder(folders, kind))):
        tokens = torch.from_numpy(r.tokens.astype(np.int64))[None]
        for i in r.images:
            tokens[0, i.start : i.start + i.layout.num_tokens] = image_id(kind)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if r.images:
            inputs |= official_pixels(kind, tuple(PIXELS[i.image.digest] for i in r.images))
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
        found[r.key] = tuple(out[0, tokens.shape[1] :].tolist())
    return found


ARRANGEMENTS = (
    {},
    {"decode_slots": 1},
    {"share_images": False, "share_prefix": False, "overlap": False, "prefill_tokens": 64},
)


@pytest.mark.parametrize("engine", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_gives_transformers_tokens(
    folders: Path, kind: str, engine: dict[str, Any]
) -> None:
    bench = Bench.open(_folder(folders, kind), **engine)
    assert outputs(bench.run(asked(bench))) == truth(folders, kind)


@pytest.mark.parametrize("kind", RUNS)
def test_run(folders: Path, tmp_path: Path, kind: str) -> None:
    rows = label_run(_folder(folders, kind), tmp_path, [(64, 48), (30, 90), (9, 9)], RUNS[kind])
    assert all(row["status"] == "ok" for row in rows)


def test_a_wrong_template_is_refused(folders: Path, tmp_path: Path) -> None:
    refused = start_run(_folder(folders, "1.5"), tmp_path, [(64, 48)], "chatml-llava")
    assert refused.returncode == 2
    assert "'vicuna_v1.1'" in refused.stderr
