"""Conversations from a messages column, end to end, as transformers answers them.

System, user and assistant turns; images as data URL, path, or name of the row's own, anywhere in
the text; the column as JSON text and as nested Arrow values.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.job_folder import ROOT

DEMO = ROOT / "pipeline/demo"
MAX_NEW_TOKENS = 48


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    cells = pq.read_table(DEMO / "data/scenes.parquet", columns=["image"]).slice(0, 3)
    return [c["bytes"] if isinstance(c, dict) else c for c in cells.column("image").to_pylist()]


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def conversations(folder: Path, pictures: list[bytes]) -> dict[str, tuple[list[Any], list[int]]]:
    """By name: turns, and the pictures that they show in order."""
    (folder / "second.png").write_bytes(pictures[1])
    inline = "data:image/png;base64," + base64.b64encode(pictures[0]).decode()
    ask, again = text("Describe this image."), text("List the objects as JSON.")
    system = {"role": "system", "content": "You look closely."}
    said = {"role": "assistant", "content": [text("A cat.")]}
    return {
        "own image": ([user(image("image:0"), ask)], [0]),
        "data url": ([user(image(inline), ask)], [0]),
        "path": ([user(image(str(folder / "second.png")), ask)], [1]),
        "relative path": ([user(image("second.png"), ask)], [1]),
        "image behind text": ([user(ask, image("image:1"))], [2]),
        "image between": ([user(text("What is"), image("image"), text(" in this?"))], [0]),
        "system": ([system, user(image("image:0"), again)], [0]),
        "turns": ([user(image("image:0"), ask), said, user(again)], [0]),
        "images in turns": (
            [system, user(image("image:1"), ask), said, user(image(inline), again)], [2, 0],
        ),
        "no image": ([user(text("How many objects are there?"))], []),
        "one image twice": ([user(image("image:0"), image("image:0"), ask)], [0, 0]),
    }  # fmt: skip


def run(config: str, source: Path, out: Path, *sets: str) -> list[dict[str, Any]]:
    variables = {"ROWS": str(source), "OUT": str(out), "MODEL": "demo", "PYTHONPATH": str(ROOT)}
    changes = (
        "generation.temperature=0", "generation.repetition_penalty=1", "input.id=id",
        f"generation.max_new_tokens={MAX_NEW_TOKENS}", "generation.top_p=null", *sets,
    )  # fmt: skip
    line = [sys.executable, "-m", "jobs.cli", "run", str(ROOT / config)]
    line += [part for change in changes for part in ("--set", change)]
    done = subprocess.run(line, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pq.read_table(out / "data").to_pylist()


@pytest.fixture(scope="module")
def expected(pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What transformers answers, by conversation."""
    talks = conversations(tmp_path_factory.mktemp("talks"), pictures)
    return {name: reference(turns, shown, pictures) for name, (turns, shown) in talks.items()}


def reference(turns: list[Any], shown: list[int], pictures: list[bytes]) -> str:
    """Greedy text of transformers' own model, image processor and tokenizer."""
    import torch

    model, tokenizer, processor = _theirs()
    values = [Image.open(io.BytesIO(pictures[number])).convert("RGB") for number in shown]
    seen = processor(values, return_tensors="pt") if values else {}
    counts = [int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", [])]
    words = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for count in counts:
        words = words.replace("<|image_pad|>", "<|pad here|>" * count, 1)
    ids = tokenizer(words.replace("<|pad here|>", "<|image_pad|>"), return_tensors="pt").input_ids
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False, repetition_penalty=1.0,
        mm_token_type_ids=(ids == model.config.image_token_id).int(), **seen,
    )  # fmt: skip
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


_loaded: list[Any] = []


def _theirs() -> tuple[Any, Any, Any]:
    if not _loaded:
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        _loaded.append((model, tokenizer, Qwen2VLImageProcessorPil.from_pretrained(DEMO)))
    return _loaded[0]


def test_json_text(tmp_path: Path, pictures: list[bytes], expected: dict[str, Any]) -> None:
    talks = conversations(tmp_path, pictures)
    table = pa.table(
        {
            "id": list(talks),
            "messages": [json.dumps(turns) for turns, _ in talks.values()],
            "image": pa.array([[pictures[0], pictures[2]]] * len(talks), pa.list_(pa.binary())),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = run("configs/chat.yaml", tmp_path / "rows.parquet", tmp_path / "out",
               f"input.base_path={tmp_path}")  # fmt: skip
    assert {row["row_id"]: row["answer"] for row in rows} == expected
    assert all(row["status"] == "ok" for row in rows)


def test_nested_values_as_datasets_stores_them(
    tmp_path: Path, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    """Every part has all keys there; those that are not its own are null."""
    talks = conversations(tmp_path, pictures)
    part = pa.struct(
        {"type": pa.string(), "text": pa.string(), "image_url": pa.struct({"url": pa.string()})}
    )
    turn = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    nested = []
    for turns, _ in talks.values():
        full = [
            t if isinstance(t["content"], list) else t | {"content": [text(t["content"])]}
            for t in turns
        ]
        nested.append(full)
    table = pa.table(
        {
            "id": list(talks),
            "messages": pa.array(nested, pa.list_(turn)),
            "image": pa.array([[pictures[0], pictures[2]]] * len(talks), pa.list_(pa.binary())),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = run("configs/chat.yaml", tmp_path / "rows.parquet", tmp_path / "out",
               f"input.base_path={tmp_path}")  # fmt: skip
    assert {row["row_id"]: row["answer"] for row in rows} == expected
