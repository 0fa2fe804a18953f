"""How long a fresh process takes until it works: to an open model, and to a first answer.

Run again and again with the weights in the page cache. As a program it is the process measured:

    python -m scripts.bench.ready '{"model": "demo", "device": "cpu"}'
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "READY "


def run(
    model: str, engine: dict[str, Any], options: dict[str, Any], times: int = 3
) -> dict[str, Any]:
    """Seconds of each start, and the medians: model open, first answer's text there."""
    asked = json.dumps({"model": model, "engine": engine, "options": options})
    found = [_one(asked) for _ in range(times)]
    return {
        "open_s": round(statistics.median(opened for opened, _ in found), 2),
        "ready_s": round(statistics.median(answered for _, answered in found), 2),
        "starts": [[round(opened, 2), round(answered, 2)] for opened, answered in found],
    }


def _one(asked: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "scripts.bench.ready", asked]
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (x for x in done.stdout.splitlines() if x.startswith(MARK))
    opened, answered = json.loads(line.removeprefix(MARK))
    return opened - started, answered - started


def main() -> None:
    from pipeline.labeller import Labeller
    from scripts.bench import measure, workloads

    asked = json.loads(sys.argv[1])
    load = workloads.make("caption", 1, 7)
    chosen = measure.settings(asked["model"], [load], asked["engine"], asked["options"])
    labeller = Labeller(chosen)
    opened = time.time()
    try:
        (answer,) = labeller.label([measure.shard(load, "ready", frozenset(chosen.prompts))])
        answered = time.time()
    finally:
        labeller.close()
    if answer.error:
        raise SystemExit(answer.error)
    print(MARK + json.dumps([opened, answered]), flush=True)


if __name__ == "__main__":
    main()
