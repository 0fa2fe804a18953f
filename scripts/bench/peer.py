"""Another engine's measurements beside ours: runs its program, reads its lines, takes ratios.

A peer writes one JSON line a repetition (`peer_vllm.py`). Both engines make their workloads from
the same names and seeds, so a repetition of one is paired with the same one of the other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench import results

ROOT = Path(__file__).resolve().parents[2]
SAME = ("work", "rows", "device")
ABOUT = ("version", "date", "start_s", "slots", "prefill_tokens", "quantization")


def run(name: str, model: str, path: str, options: list[str]) -> list[dict[str, Any]]:
    """Measure the peer in a process of its own; its lines."""
    folders = [f"{path}/site", f"{path}/{name}", str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.jsonl"
        program = f"scripts/bench/peer_{name}.py"
        command = [sys.executable, program, "--model", model, "--out", str(out), *options]
        subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False)
        return read(out)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a peer's file; none where it wrote none."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def beside(row: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Our row's fields about its peers: each one's rates on the same rows, and our ratio to it.

    The ratio is the median over the repetitions that both ran (same seed), of the same number of
    rows on the same device.
    """
    same = [x for x in lines if all(x[k] == row[k] for k in SAME)]
    found: dict[str, Any] = {}
    for name in sorted({_title(line) for line in same}):
        theirs = {line["seed"]: line for line in same if _title(line) == name}
        ours = dict(zip(row["seeds"], row["seconds"], strict=True))
        both = [seed for seed in ours if seed in theirs]
        if not both:
            continue
        found[name] = {
            "rows_per_s": results.quantiles([line["rows_per_s"] for line in theirs.values()]),
            "seconds": [line["seconds"] for line in theirs.values()],
            "repetitions_paired": len(both),
            "ratio": round(statistics.median(theirs[s]["seconds"] / ours[s] for s in both), 3),
            **{key: next(iter(theirs.values())).get(key) for key in ABOUT},
        }
    return found


def _title(line: dict[str, Any]) -> str:
    quantized = line.get("quantization", "none")
    return line["peer"] if quantized == "none" else f"{line['peer']}_{quantized}"
