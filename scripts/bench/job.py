"""The same rows through the command: Parquet in, `vlm-batch run`, `verify`, Parquet out.

Measures what a user waits for, the start of Python, the model's load and the commits included.
The caption workload runs `configs/caption.yaml` itself; of the others all answers have one length
here, the workload's median, since a length belongs to a prompt.
"""

from __future__ import annotations

import json
import os
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
CAPTION = ROOT / "configs" / "caption.yaml"


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
    """Run the job in a folder of its own, once more with nothing left to do, and verify it."""
    with tempfile.TemporaryDirectory(prefix="vlm-batch-bench-") as name:
        folder = Path(name)
        write_parquet(workload, folder / "rows.parquet")
        file = _config_file(workload, model, folder)
        command = _Command(model, folder, ["generation.ignore_eos=true", *sets])
        first = command.timed("run", str(file))
        again = command.timed("run", str(file))
        verified = json.loads(command("verify", str(folder / "out"), "--json"))
        written = pq.ParquetDataset(str(folder / "out" / "data")).read(columns=["status"])
    return {
        "rows_per_s": round(workload.num_answers / first, 3),
        "seconds": [round(first, 3)],
        "seconds_run_again": round(again, 3),
        "answer_tokens": int(statistics.median(workload.output_tokens)),
        "config": str(file.relative_to(ROOT)) if file == CAPTION else "generated",
        "rows_written": written.num_rows,
        "verify": verified,
    }


def _config_file(workload: Workload, model: str, folder: Path) -> Path:
    if workload.name == "caption":
        return CAPTION
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(config(workload, model, folder), sort_keys=False))
    return file


class _Command:
    """Calls `vlm-batch` on the run folder; a failure ends the program."""

    def __init__(self, model: str, folder: Path, sets: list[str]) -> None:
        self.sets = [part for s in sets for part in ("--set", s)]
        self.environment = os.environ | {
            "MODEL": model,
            "IMAGES": str(folder / "rows.parquet"),
            "OUT": str(folder / "out"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def __call__(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"vlm-batch {arguments[0]} ended with {done.returncode}.")
        return done.stdout

    def timed(self, *arguments: str) -> float:
        started = time.perf_counter()
        self(*arguments, *self.sets)
        return time.perf_counter() - started
