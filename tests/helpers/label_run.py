"""One `vlm-batch run` as a user starts it, on a few pictures and a small checkpoint."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from tests.helpers.parity import random_image

ROOT = Path(__file__).resolve().parents[2]


def _png(width: int, height: int, seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(random_image(width, height, seed)).save(out, "PNG")
    return out.getvalue()


def label_run(
    checkpoint: Path,
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    template: str = "auto",
    **sections: Any,
) -> list[dict[str, Any]]:
    """Rows of the run's output, one a size, each asked two questions; fails unless it exits 0."""
    ended = start_run(checkpoint, folder, sizes, template, **sections)
    assert ended.returncode == 0, ended.stderr
    parts = sorted((folder / "out/data").glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(part) for part in parts]).to_pylist()
    assert len(rows) == len(sizes)
    return rows


def start_run(
    checkpoint: Path,
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    template: str = "auto",
    **sections: Any,
) -> subprocess.CompletedProcess[str]:
    """The command's end, whatever it is."""
    images = [_png(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    table = pa.table({"id": [f"r{i}" for i in range(len(sizes))], "image": images})
    pq.write_table(table, folder / "in.parquet")
    config = {
        "model": {"id": str(checkpoint), "chat_template": template},
        "input": {"path": str(folder / "in.parquet"), "id": "id", "image": "image"},
        "prompts": {"caption": "Describe this image.", "count": "How many things?"},
        "generation": {"max_new_tokens": 8, "temperature": 0.0},
        "engine": {"device": "cpu", "workers": 1},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config | sections))
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", str(folder / "job.yaml")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
