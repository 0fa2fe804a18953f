"""One measured point as one JSON object: where it was measured, and the committed file of them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results.jsonl"
ROOT = Path(__file__).resolve().parents[2]


def append(row: dict[str, Any], path: Path | None = FILE) -> None:
    """Add the row as one line to the file, if one is given, and print it to stdout."""
    line = json.dumps(row)
    if path is not None:
        with path.open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)


def surroundings(device: str, program: str = "scripts/bench.py") -> dict[str, Any]:
    """Who measured: commit, date, machine, versions, command."""
    return {
        "commit": commit(),
        "date": now(),
        **_device(device),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "command": " ".join([program, *sys.argv[1:]]),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")


def commit() -> str:
    """The commit from VLM_BENCH_COMMIT or git; without both a hash of the source files."""
    named = os.environ.get("VLM_BENCH_COMMIT") or _output(
        "git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"
    )
    return named if named != "unknown" else f"source-{source_hash()}"


def source_hash() -> str:
    """Ten digits that change with any of the Python files that a measurement runs."""
    total = hashlib.sha256()
    for folder in ("jobs", "pipeline", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:10]


def measured_elsewhere(file: Path) -> list[dict[str, Any]]:
    """The rows of another machine's file; those of this very source get this commit's name."""
    here = f"source-{source_hash()}"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    for row in rows:
        row["commit"] = commit() if row["commit"] == here else row["commit"]
    return rows


def peak_memory(device: str) -> dict[str, float]:
    """Gigabytes at most: of this process and its dead children, and of the device."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    found = {"host_gb": round(max(own, children) / 2**20, 2)}
    if device.startswith("cuda"):
        import torch

        found["device_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile: nearest of the values, so no number is invented."""
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[round(share / 100 * (len(ordered) - 1))], 3)
        for share in (20, 50, 80)
    }


def gpu_name() -> str:
    """The first GPU's name, without torch."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines()[0]


def _device(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {"device": _cpu_name(), "cores": os.cpu_count()}
    import torch

    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", *query).splitlines()[0],
        "cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
