"""The host alone: from rows to decoded pixels handed over, with a device that takes no time.

Runs the labeller itself with an engine in its place that copies the pixels out, as an upload to a
GPU does, and completes every request at once. Says how many images a second the host would keep up
with, what an image costs each process, and whether memory stays where it is.

    python -m scripts.bench.feeder --workers 1,2 --images 2000   # rates, and those of 16 cores
    python -m scripts.bench.feeder --workers 1 --images 20000    # memory over a long run
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.errors import RowError  # noqa: E402
from pipeline.rows import Completion, ImageRef, Row, ShardWork  # noqa: E402
from scripts.bench import processes, results, workloads  # noqa: E402

SIZE = (1024, 768)
NUM_SOURCES = 48  # different pictures; each row's bytes are its own
ROWS_PER_SHARD = 4096
NUM_SAMPLES = 20
CORES = 16


class Sink:
    """Takes what the feeder delivers, as the engine does: copies, gives back, completes."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_bytes = 0
        self.waited = 0.0
        self.draining = False
        self._staging = np.empty(64 << 20, np.uint8)

    def run(self, feed: Any) -> Iterator[Completion]:
        from pipeline.feeder import END

        while True:
            started = time.perf_counter()
            fed = feed.get(0.1)
            self.waited += time.perf_counter() - started
            if fed is END:
                return
            if fed is None:
                continue
            for image in fed.images:
                if isinstance(image, RowError):
                    raise SystemExit(str(image))
                self._staging[: image.size] = image.reshape(-1)
                self.num_images += 1
                self.num_bytes += image.size
            fed.release()
            for request in getattr(fed.item, "requests", ()):
                yield Completion(request.key, (1,), "length", request.num_tokens, 0)


def open_labeller(workers: int) -> Any:
    """A labeller that feeds a GPU which is not there."""
    import torch

    from pipeline.engine import build
    from pipeline.labeller import Labeller
    from pipeline.settings import (
        EngineSettings,
        InputSettings,
        LabelSettings,
        ModelSettings,
        PromptSettings,
    )

    chosen = LabelSettings(
        model=ModelSettings(id="demo", max_pixels=12_845_056),
        input=InputSettings(path="memory"),
        prompts={"answer": PromptSettings(text=workloads.DESCRIBE)},
        engine=EngineSettings(workers=workers, threads=1),
    )
    plain = build.choose_device, build.build_engine
    build.choose_device = lambda settings: torch.device("cuda")
    build.build_engine = lambda *parts: Sink()  # type: ignore[assignment, return-value]
    try:
        return Labeller(chosen)
    finally:
        build.choose_device, build.build_engine = plain


def pictures() -> list[bytes]:
    return list(workloads.make("caption", NUM_SOURCES, 5).images)


def shards(sources: list[bytes], num_images: int) -> Iterator[ShardWork]:
    for start in range(0, num_images, ROWS_PER_SHARD):
        numbers = range(start, min(start + ROWS_PER_SHARD, num_images))
        yield ShardWork(f"shard{start}", rows(sources, numbers))


def rows(sources: list[bytes], numbers: range) -> Iterator[Row]:
    for index, number in enumerate(numbers):
        # NOTE: bytes after a JPEG's end are not read; they make this row's picture its own.
        data = sources[number % len(sources)] + struct.pack("<Q", number)
        yield Row(str(number), index, {}, (ImageRef(data=data),))


def measure(workers: int, num_images: int, sources: list[bytes]) -> dict[str, Any]:
    """One pass over that many images."""
    labeller = open_labeller(workers)
    try:
        for _ in labeller.label(shards(sources, 64)):
            pass
        before = _usage()
        started = time.perf_counter()
        memory, step = [], max(1, num_images // NUM_SAMPLES)
        for count, _ in enumerate(labeller.label(shards(sources, num_images)), 1):
            if count % step == 0:
                memory.append(processes.family_resident_bytes())
        seconds = time.perf_counter() - started
        own, children = (b - a for a, b in zip(before, _usage(), strict=True))
    finally:
        labeller.close()
    return _row(workers, num_images, seconds, own, children, memory)


def _usage() -> tuple[float, float]:
    """Processor seconds of this process, and of those below it."""
    own = sum(os.times()[:2])
    return own, processes.family_cpu_seconds() - sum(os.times()[:4])


def _row(
    workers: int, num_images: int, seconds: float, own: float, children: float, memory: list[int]
) -> dict[str, Any]:
    host, worker = own / num_images, children / num_images
    half = len(memory) // 2
    return {
        "workers": workers,
        "images": num_images,
        "images_per_s": round(num_images / seconds, 1),
        "host_ms_an_image": round(1e3 * host, 3),
        "worker_ms_an_image": round(1e3 * worker, 3),
        # the busiest side sets the pace: 14 decoding processes, or the one that hands over
        f"images_per_s_on_{CORES}_cores": round(min((CORES - 2) / worker, 1 / host)),
        "resident_mb": [round(m / 1e6) for m in memory],
        "growth_mb_second_half": round((max(memory[half:]) - max(memory[:half])) / 1e6, 1)
        if half
        else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="1,2", help="decoding processes; commas between")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=results.FILE)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    sources = pictures()
    for workers in map(int, args.workers.split(",")):
        found = measure(workers, args.images, sources)
        about = results.surroundings("cpu", "scripts/bench/feeder.py")
        row = {"name": "feeder", **about, "size": SIZE, **found}
        results.append(row, None if args.no_record else args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
