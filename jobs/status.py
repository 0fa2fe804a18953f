"""What a run folder says of its job: rows by state, shards, who is at work, rate and time left.

Reads footers and small files only, never a row. Knows a folder, no config file.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs.commit import part_info, pending_shards
from jobs.events import read_events
from jobs.journal import count_journaled
from jobs.leases import is_dead
from jobs.manifest import require_manifest
from jobs.part import PartDamaged, PartInfo
from jobs.paths import RunPaths
from jobs.plan import Shard, load_plan
from jobs.progress import format_seconds
from jobs.slurm_tasks import read_arrays

RATE_WINDOW_SEC = 3600.0
NUM_READERS = 16


def read_status(path: str) -> dict[str, Any]:
    """The status as a plain dictionary, for `--json` and for people. Raises: UserError."""
    paths = RunPaths(path)
    manifest = require_manifest(paths)
    plan = load_plan(paths)
    pending = {shard.id for shard in pending_shards(paths, plan)}
    states, damaged = _states(paths, [s for s in plan if s.id not in pending])
    workers = _workers(paths)
    running = sorted({worker["shard"] for worker in workers} & pending)
    prompts = max(1, len(manifest.job_config().prompt_names()))
    journaled = sum(
        count_journaled(paths, shard.id, manifest.fingerprint, shard.revision)
        for shard in map(plan.shard, paths.storage.folders(paths.journals_folder))
        if shard.id in pending
    )
    rows_left = sum(plan.shard(shard).num_rows for shard in pending)
    rate = _rows_per_sec(paths)
    return {
        "path": paths.root,
        "model": manifest.config.get("model", {}).get("id"),
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "complete": not pending and not damaged,
        "rows": {
            "total": plan.num_rows,
            "left": rows_left,
            **{state: states[state] for state in ("ok", "failed", "filtered")},
            "in_journals": journaled // prompts,
        },
        "shards": {
            "total": plan.num_shards,
            "committed": plan.num_shards - len(pending),
            "running": len(running),
            "damaged": damaged,
        },
        "workers": workers,
        "slurm": [vars(array) for array in read_arrays(paths)],
        "rows_per_sec": rate,
        "seconds_left": round(rows_left / rate, 1) if rate and pending else None,
    }


def brief(status: dict[str, Any]) -> str:
    """One line: what a run prints when it ends."""
    rows = status["rows"]
    text = f"{status['path']}: {rows['total']} rows, {rows['ok']} ok, {rows['failed']} failed"
    if rows["filtered"]:
        text += f", {rows['filtered']} filtered"
    return text + (f", {rows['left']} left" if rows["left"] else "")


def lines(status: dict[str, Any]) -> str:
    """The whole status for people."""
    shards, rows = status["shards"], status["rows"]
    told = [
        brief(status),
        f"model {status['model']}, job {status['fingerprint']}, made {status['created']}",
        f"shards: {shards['committed']} of {shards['total']} committed, "
        f"{shards['running']} running",
    ]
    if rows["in_journals"]:
        told.append(f"finished in journals, not yet committed: about {rows['in_journals']} rows")
    if shards["damaged"]:
        told.append(f"damaged: {', '.join(shards['damaged'])} (see `vlm-batch verify`)")
    for worker in status["workers"]:
        state = "gone" if worker["dead"] else "at work"
        place = f"{worker['host']}, process {worker['pid']}"
        slurm = f", SLURM job {worker['slurm_job']}" if worker["slurm_job"] else ""
        told.append(f"  {worker['shard']}: {place}{slurm}, {state}")
    for array in status["slurm"]:
        kind = f"{array['tasks']} tasks" if array["tasks"] else "verifies at the end"
        states = ", ".join(f"{n} {state.lower()}" for state, n in sorted(array["states"].items()))
        told.append(f"SLURM job {array['job']} ({kind}): {states or 'no longer known'}")
    if status["rows_per_sec"]:
        left = status["seconds_left"]
        eta = f", {format_seconds(left)} left" if left is not None else ""
        told.append(f"rate: {status['rows_per_sec']:.1f} rows/s{eta}")
    return "\n".join(told)


def read_infos(
    paths: RunPaths, shards: list[Shard]
) -> list[tuple[Shard, PartInfo | PartDamaged | None]]:
    """Each shard's commit record, what is wrong with it, or None where there is no part."""

    def read(shard: Shard) -> PartInfo | PartDamaged | None:
        try:
            return part_info(paths, shard.id)
        except FileNotFoundError:
            return None
        except PartDamaged as error:
            return error

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(zip(shards, pool.map(read, shards), strict=True))


def _states(paths: RunPaths, shards: list[Shard]) -> tuple[Counter[str], list[str]]:
    states: Counter[str] = Counter()
    damaged = []
    for shard, info in read_infos(paths, shards):
        if isinstance(info, PartInfo):
            states.update(info.states)
        elif info is not None:
            damaged.append(shard.id)
    return states, damaged


def _workers(paths: RunPaths) -> list[dict[str, Any]]:
    """Who holds a lease."""
    found: dict[str, dict[str, Any]] = {}
    for name in paths.storage.names(paths.lease_folder):
        try:
            held = json.loads(paths.storage.read(f"{paths.lease_folder}/{name}"))
        except (FileNotFoundError, ValueError):
            continue
        shard = name.split(".", 1)[0]
        found[shard] = {  # a later turn of the same shard replaces the earlier
            "shard": shard,
            **{key: held.get(key) for key in ("attempt", "host", "pid", "slurm_job", "beats")},
            "dead": is_dead(held),
        }
    return list(found.values())


def _rows_per_sec(paths: RunPaths) -> float | None:
    """Rows committed a second over the last hour of work; None where the log does not tell."""
    commits: list[tuple[float, int]] = []
    begun: float | None = None
    for event in read_events(paths):
        if event.get("kind") == "start":
            begun = event["time"] if begun is None else begun
        if event.get("kind") == "commit" and event.get("won"):
            commits.append((event["time"], event["rows"]))
    if not commits or begun is None:
        return None
    last = commits[-1][0]
    since = max(begun, last - RATE_WINDOW_SEC)
    rows = sum(count for at, count in commits if at >= since)
    return round(rows / max(last - since, 1e-3), 3)
