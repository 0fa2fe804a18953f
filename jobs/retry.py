"""Plans the failed rows of a run folder once more, chosen by error code; the next run does them.

Rows that are ok keep their answers and their attempts. Knows no worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import pyarrow as pa

from jobs.commit import pending_shards
from jobs.manifest import require_manifest
from jobs.part import PartInfo, read_part
from jobs.paths import RunPaths
from jobs.plan import load_plan, redo_shards
from jobs.status import read_infos
from jobs.table import FAILED
from pipeline.errors import CODES, UserError


@dataclass
class Retry:
    """What will be done again."""

    shards: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # by error code


def retry(path: str, codes: Collection[str] = (), *, dry_run: bool = False) -> Retry:
    """Plan failed answers with one of `codes` (none: all of them) anew. Raises: UserError."""
    for code in codes:
        if code not in CODES:
            raise UserError(f"{code!r} is no error code; there are {', '.join(CODES)}.")
    paths = RunPaths(path)
    require_manifest(paths)
    plan = load_plan(paths)
    pending = {shard.id for shard in pending_shards(paths, plan)}
    found = Retry()
    for shard, info in read_infos(paths, [s for s in plan if s.id not in pending]):
        if isinstance(info, PartInfo) and info.states[FAILED]:
            counts = _failed_answers(paths, shard.id)
            wanted = {c: n for c, n in counts.items() if not codes or c in codes}
            if wanted:
                found.shards.append(shard.id)
                found.answers.update(wanted)
    if found.shards and not dry_run:
        redo_shards(paths, found.shards, codes or tuple(CODES))
    return found


def _failed_answers(paths: RunPaths, shard: str) -> Counter[str]:
    local = paths.local(paths.part(shard))
    table = read_part(local or paths.storage.read(paths.part(shard)), ["meta"])
    counts: Counter[str] = Counter()
    for field_ in table.schema.field("meta").type:
        codes = pa.compute.struct_field(table.column("meta"), [field_.name, "error_code"])
        counts.update(code for code in codes.to_pylist() if code is not None)
    return counts
