"""Where the device's time goes, kernel by kernel: one workload through the labeller, profiled.

    python scripts/profile_engine.py --random-weights 7b --work caption --rows 128
    python scripts/profile_engine.py --published kimi-vl-a3b --quantization fp8

Prints the kernels by total time, and how long the device had nothing to do. Records no result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench import checkpoint, measure, published, random_weights, workloads  # noqa: E402

NUM_KERNELS = 40
NUM_GAPS = 20
LONG_GAP = 0.002  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random-weights", choices=sorted(checkpoint.SIZES), default="7b")
    parser.add_argument("--published", choices=published.names(), help="instead, in no file")
    parser.add_argument("--work", choices=workloads.NAMES, default="caption")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--quantization", default="none")
    args = parser.parse_args()
    folder = Path("/dev/shm") / f"vlm-batch-{args.published or args.random_weights}"
    if args.published:
        published.write_small_files(args.published, folder)
    else:
        checkpoint.make(folder, args.random_weights, ROOT / ".whl/tokenizer", "cuda")
    loads = [workloads.make(args.work, args.rows, seed) for seed in (1, 2)]
    options = {"quantization": args.quantization}
    chosen = measure.settings(str(folder), loads, {}, options)
    with random_weights.installed() if args.published else nullcontext():
        report(*profiled(chosen, loads))
    return 0


def profiled(chosen: Any, loads: list[Any]) -> tuple[list[tuple[str, float, float]], float]:
    """(name, start, end) of every kernel in seconds, and the pass's wall time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from pipeline.labeller import Labeller

    labeller = Labeller(chosen)
    prompts = frozenset(chosen.prompts)
    try:
        list(labeller.label([measure.shard(loads[0], "warmup", prompts)]))
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            started = time.perf_counter()
            torch.ones(1, device="cuda")  # the waits before the first kernel count too
            list(labeller.label([measure.shard(loads[1], "profiled", prompts)]))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    finally:
        labeller.close()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in kernels]
    return spans, seconds


def report(events: list[tuple[str, float, float]], seconds: float) -> None:
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for name, start, end in events:
        total[name] += end - start
        count[name] += 1
    busy, gaps = busy_and_gaps(events)
    idle = sum(length for length, _, _ in gaps)
    long = [gap for gap in gaps if gap[0] > LONG_GAP]
    print(f"wall {seconds:.3f} s, device busy {busy:.3f} s; gaps {idle:.3f} s in {len(gaps)}")
    print(f"gaps over {LONG_GAP * 1e3:.0f} ms: {sum(g[0] for g in long):.3f} s in {len(long)}")
    for length, at, name in sorted(long, reverse=True)[:NUM_GAPS]:
        print(f"{length * 1e3:10.1f} ms at {at:7.3f} s before {name[:90]}")
    print(f"{'ms':>10} {'count':>7} {'us each':>9}  kernel")
    for name in sorted(total, key=lambda n: -total[n])[:NUM_KERNELS]:
        each = total[name] / count[name] * 1e6
        print(f"{total[name] * 1e3:10.1f} {count[name]:7d} {each:9.1f}  {name[:110]}")


def busy_and_gaps(
    events: list[tuple[str, float, float]],
) -> tuple[float, list[tuple[float, float, str]]]:
    """Seconds in which any kernel ran; of each wait: length, time, and the kernel after it."""
    busy, first, reached = 0.0, None, 0.0
    gaps = []
    for name, start, end in sorted(events, key=lambda e: e[1]):
        if first is None:
            first = reached = start
        if start > reached:
            gaps.append((start - reached, reached - first, name))
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, gaps


if __name__ == "__main__":
    sys.exit(main())
