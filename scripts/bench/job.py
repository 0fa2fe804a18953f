"""The same rows through the command: Parquet in, `vlm-batch run`, `verify`, Parquet out.

Measures what a user waits for, the start of Python, the model's load and the commits included.
All answers have one length here, the workload's median, since a length belongs to a prompt.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from scripts.bench.workloads import PLAIN_SYSTEM, Workload

ROOT = Path(__file__).resolve().parents[2]


def write_parquet(workload: Workload, path: Path) -> None:
    """One file with `id` and `image`, in row groups small enough to be read one by one."""
    ids = [f"{workload.name}-{i:06d}" for i in range(len(workload.images))]
    table = pa.table({"id": ids, "image": pa.array(workload.images, pa.binary())})
    pq.write_table(table, path, row_group_size=64, compression="none", use_dictionary=False)


def config(workload: Workload, model: str, folder: Path) -> dict[str, Any]:
    return {
        "model": {"id": model},
        "input": {"path": str(folder / "rows.parquet"), "id": "id", "image": "image"},
        "prompts": dict(workload.prompts),
        "system": None if workload.system == PLAIN_SYSTEM else workload.system,
        "generation": {
            "max_new_tokens": int(statistics.median(workload.output_tokens)),
            "temperature": 0.0,
            "ignore_eos": True,
        },
        "output": {"path": str(folder / "out")},
    }


def run(workload: Workload, model: str, sets: list[str]) -> dict[str, Any]:
    """Run the job in a folder of its own and verify it."""
    with tempfile.TemporaryDirectory(prefix="vlm-batch-bench-") as name:
        folder = Path(name)
        write_parquet(workload, folder / "rows.parquet")
        file = folder / "job.yaml"
        file.write_text(yaml.safe_dump(config(workload, model, folder), sort_keys=False))
        started = time.perf_counter()
        _command("run", str(file), *(part for s in sets for part in ("--set", s)))
        seconds = time.perf_counter() - started
        verified = json.loads(_command("verify", str(folder / "out"), "--json"))
    return {
        "rows_per_s": round(workload.num_answers / seconds, 3),
        "seconds": [round(seconds, 3)],
        "answer_tokens": int(statistics.median(workload.output_tokens)),
        "verify": verified,
    }


def _command(*arguments: str) -> str:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vlm-batch {arguments[0]} ended with {done.returncode}.")
    return done.stdout
