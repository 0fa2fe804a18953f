"""Measures what a large job costs `jobs/` beside the model: planning, listings, leases, proofs.

Workers and time are simulated, the run folder is real (in memory, under /dev/shm): each worker
takes shards as a real one does, then every shard gets a real part and `status`, `verify` and a
further run look at them, each in a process of its own. One JSON line a size on stdout.

    python scripts/scale_jobs.py                  # 1/100 and 1/10 of 100 million rows
    python scripts/scale_jobs.py --parts 100 10 1 # and all of it, 512 workers
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.commit import pending_numbers  # noqa: E402
from jobs.config import JobConfig  # noqa: E402
from jobs.events import Events  # noqa: E402
from jobs.fingerprint import fingerprint  # noqa: E402
from jobs.leases import BEATS_PER_TTL, Leases  # noqa: E402
from jobs.manifest import Manifest, open_manifest  # noqa: E402
from jobs.part import PartInfo, write_part  # noqa: E402
from jobs.paths import RunPaths  # noqa: E402
from jobs.plan import Plan, grow_plan  # noqa: E402
from jobs.shard_queue import ShardQueue  # noqa: E402
from jobs.storage_local import LocalStorage  # noqa: E402
from jobs.table import build_table, output_schema  # noqa: E402
from pipeline.rows import Answer, RequestKey  # noqa: E402

ROWS, WORKERS, FILES, ROWS_PER_SHARD = 100_000_000, 512, 1000, 4000
COUNTED = ("names", "entries", "read", "token", "write_exclusive", "replace", "delete")
MEASURED = """
import json, re, resource, sys
from jobs.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
told = {"cpu_s": round(used.ru_utime + used.ru_stime, 2), "peak_mb": round(peak / 1024, 1)}
print(json.dumps(told), file=sys.stderr)
sys.exit(code)
"""
ANSWER = "A grey cat sits on a wooden table beside a cup of coffee and looks to the left. "


class File(NamedTuple):
    """An input file as the plan sees it."""

    path: str
    num_rows: int
    fingerprint: str
    num_bytes: int


class Kept(NamedTuple):
    """A row as the table sees it."""

    row_id: str
    columns: tuple[Any, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, nargs="*", default=[100, 10], help="1/N of the job")
    parser.add_argument("--no-proof", action="store_true", help="without parts, status and verify")
    args = parser.parse_args()
    os.fsync = lambda fd: None  # the disk is not what is measured
    calls = count_calls()
    for part in args.parts:
        size = ROWS // part, max(WORKERS // part, 1), max(FILES // part, 1)
        print(json.dumps(measure(*size, calls, prove=not args.no_proof)), flush=True)
    return 0


def count_calls() -> Counter[str]:
    """Count the storage's operations from now on."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(LocalStorage, name)

        def call(self: LocalStorage, *args: Any) -> Any:
            calls[name] += 1
            return original(self, *args)

        return call

    for name in COUNTED:
        setattr(LocalStorage, name, counted(name))
    return calls


def measure(
    rows: int, workers: int, files: int, calls: Counter[str], *, prove: bool
) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="scale-", dir="/dev/shm")
    try:
        paths = RunPaths(folder)
        manifest = make_manifest(paths)
        plan, planned = plan_job(paths, rows, files)
        calls.clear()
        worked = work(paths, plan, workers)
        counts = {name: round(calls[name] / plan.num_shards, 2) for name in COUNTED}
        start = time.perf_counter()
        assert not pending_numbers(paths, plan)
        listing = round((time.perf_counter() - start) * 1e3, 1)
        size = {"rows": rows, "shards": plan.num_shards, "workers": workers, "files": files}
        told = {**size, **planned, **worked, "operations_per_shard": counts, "listing_ms": listing}
        return told | (proofs(paths, plan, manifest) if prove else {})
    finally:
        shutil.rmtree(folder)


def make_manifest(paths: RunPaths) -> Manifest:
    values = {
        "model": {"id": "demo"},
        "input": {"path": "s3://in"},
        "prompts": {"caption": "Describe."},
        "output": {"path": paths.root, "rows_per_shard": ROWS_PER_SHARD},
    }
    config = JobConfig.model_validate(values)
    schema = output_schema(config, None).to_string()
    return open_manifest(paths, config, fingerprint(config, "model"), output_schema=schema)


def plan_job(paths: RunPaths, rows: int, files: int) -> tuple[Plan, dict[str, Any]]:
    inputs = [File(f"s3://in/{i:06d}.parquet", rows // files, f"f{i}", 0) for i in range(files)]
    start = time.perf_counter()
    grow_plan(paths, inputs, ROWS_PER_SHARD)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    plan = grow_plan(paths, inputs, ROWS_PER_SHARD)  # as every further run does
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return plan, {"plan_ms": round(seconds * 1e3, 1), "plan_peak_kb": peak // 1000}


def work(paths: RunPaths, plan: Plan, workers: int) -> dict[str, Any]:
    """All shards once, each taking about one unit of simulated time."""
    rng = random.Random(0)
    queues = [ShardQueue(paths, plan, Leases(paths, 1e9), random.Random(i)) for i in range(workers)]
    data = Path(paths.url(paths.data_folder))
    data.mkdir()
    events: list[tuple[float, int, Any]] = [(rng.random(), i, None) for i in range(workers)]
    heapq.heapify(events)
    start, num_waits, now = time.perf_counter(), 0, 0.0
    while events:
        now, number, ticket = heapq.heappop(events)
        queue = queues[number]
        if ticket is not None:
            (data / f"{ticket.shard.id}.parquet").touch(exist_ok=False)
            queue.done(ticket.shard.id)
            queue.leases.release(ticket.lease)
        ticket = queue.take()
        if ticket is not None:
            heapq.heappush(events, (now + rng.uniform(0.5, 1.5), number, ticket))
        elif queue.num_left:
            num_waits += 1
            heapq.heappush(events, (now + 0.2, number, None))
    seconds = time.perf_counter() - start
    ideal = plan.num_shards / workers
    return {
        "take_ms_per_shard": round(seconds * 1e3 / plan.num_shards, 2),
        "listings_per_worker": round(sum(q.num_listings for q in queues) / workers, 1),
        "waits_per_worker": round(num_waits / workers, 1),
        "time_over_ideal": round(now / ideal, 3),
        "beats_per_sec": round(workers * BEATS_PER_TTL / 120.0, 1),
    }


def proofs(paths: RunPaths, plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """Give every shard a real part; then what the commands cost that look at all of them."""
    start = time.perf_counter()
    num_bytes = write_parts(paths, plan, manifest)
    seconds = time.perf_counter() - start
    return {
        "part_mb": round(num_bytes / plan.num_shards / 1e6, 2),
        "write_ms_per_part": round(seconds * 1e3 / plan.num_shards, 1),
        "status": command("status", paths.root, "--json"),
        "verify": command("verify", paths.root, "--json", "--no-input"),
        "import_only": command("--version"),
    }


def write_parts(paths: RunPaths, plan: Plan, manifest: Manifest) -> int:
    """One table for all parts: only their commit records differ."""
    table: pa.Table | None = None
    events, num_bytes = Events(paths), 0
    events.write("start", rows_left=plan.num_rows)
    for shard in plan:
        if table is None or table.num_rows != shard.num_rows:
            table = make_table(shard.num_rows, manifest)
        place = {"path": shard.path, "start": shard.start, "stop": shard.stop}
        info = PartInfo(
            shard=shard.id,
            attempt="a",
            fingerprint=manifest.fingerprint,
            num_rows=shard.num_rows,
            states={"ok": shard.num_rows, "failed": 0, "filtered": 0},
            input={**place, "fingerprint": shard.fingerprint},
        )
        path = Path(paths.url(paths.part(shard.id)))
        write_part(path, table, info)
        num_bytes += path.stat().st_size
        events.write("commit", shard=shard.id, rows=shard.num_rows, won=True)
    return num_bytes


def make_table(num_rows: int, manifest: Manifest) -> pa.Table:
    rng = random.Random(0)
    words = ANSWER.split()
    config = manifest.job_config()
    answers = {}
    for row in range(num_rows):
        text = " ".join(rng.choices(words, k=40))
        key = RequestKey("s", row, "caption")
        answers[row, "caption"] = Answer(key, text, "stop", 1000, 20, 50)
    rows = [Kept(f"{row:012d}") for row in range(num_rows)]
    return build_table(output_schema(config, None), rows, answers, dict.fromkeys(answers, "a"))


def command(*args: str) -> dict[str, Any]:
    """Wall time, processor time and peak memory of one `vlm-batch` command."""
    line = [sys.executable, "-c", MEASURED, *args]
    start = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wall = time.perf_counter() - start
    told = json.loads(done.stderr.splitlines()[-1])
    return {"code": done.returncode, "wall_s": round(wall, 2), **told}


if __name__ == "__main__":
    raise SystemExit(main())
