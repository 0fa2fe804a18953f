"""Proves a run folder: every input row in exactly one committed part, every part byte for byte.

Says what is wrong with which file and what to do; `repair` gives the shards of bad parts back to
be done again. Memory is that of one part. Knows no worker.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.commit import is_committed, pending_shards
from jobs.damage import FileDamaged, Finding
from jobs.events import Events, read_events
from jobs.journal import read_journals
from jobs.manifest import Manifest, require_manifest
from jobs.part import PartDamaged, check_part, expected, read_part
from jobs.paths import RunPaths, part_shard
from jobs.plan import Plan, Shard, load_plan, redo_shards
from jobs.table import FAILED, OK, STATES
from pipeline.errors import CODES, UserError

NUM_READERS = 4
REDO_ADVICE = "Run `vlm-batch verify --repair`, then the job again: the shard is done anew."


@dataclass
class Verdict:
    """What `verify` found."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # harmless
    states: Counter[str] = field(default_factory=Counter)
    rows_planned: int = 0
    rows_input: int | None = None  # None: not looked at
    rows_left: int = 0
    shards_checked: int = 0
    repaired: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Every row has its state and nothing is damaged."""
        return not self.findings and not self.rows_left

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "states": dict(self.states), "whole": self.is_whole}


def verify(path: str, *, look_at_input: bool = True) -> Verdict:
    """Check everything that the run folder promises. Raises: UserError."""
    paths = RunPaths(path)
    try:
        manifest = require_manifest(paths)
        plan = load_plan(paths)
    except FileDamaged as error:
        return Verdict(paths.root, findings=[error.finding])
    verdict = Verdict(paths.root, rows_planned=plan.num_rows)
    pending = {shard.id: shard for shard in pending_shards(paths, plan)}
    verdict.rows_left = sum(shard.num_rows for shard in pending.values())
    _check_plan(plan, verdict)
    _check_names(paths, plan, verdict)
    _check_parts(paths, manifest, plan, pending, verdict)
    _check_gone(paths, pending, verdict)
    _check_journals(paths, manifest, pending, verdict)
    if look_at_input:
        _check_input(manifest, plan, verdict)
    return verdict


def repair(path: str, verdict: Verdict) -> Verdict:
    """Delete the parts that findings name, so that their shards are done again."""
    paths = RunPaths(path)
    plan = load_plan(paths)
    shards = sorted({f.shard for f in verdict.findings if f.shard is not None})
    for shard in shards:
        paths.storage.delete(paths.part(shard))
        Events(paths).write("repair", shard=shard)
    redo_shards(paths, [shard for shard in shards if plan.shard(shard).revision])
    verdict.repaired = shards
    return verdict


def _check_plan(plan: Plan, verdict: Verdict) -> None:
    """Spans of a file follow each other without gap and overlap."""
    for path, spans in plan.files().items():
        stop = 0
        for span in spans:
            if span.start != stop:
                problem = f"rows {stop} and {span.start} of {path} do not meet in the plan"
                verdict.findings.append(Finding("plan/", problem, "Start a new run folder."))
            stop = span.stop


def _check_names(paths: RunPaths, plan: Plan, verdict: Verdict) -> None:
    for name in paths.storage.names(paths.data_folder):
        shard = part_shard(name)
        if shard is None or shard not in plan:
            file = f"{paths.data_folder}/{name}"
            problem = "belongs to no shard of the plan"
            advice = "Move it out of data/: readers of data/*.parquet would count it."
            verdict.findings.append(Finding(file, problem, advice))


def _check_parts(
    paths: RunPaths, manifest: Manifest, plan: Plan, pending: dict[str, Shard], verdict: Verdict
) -> None:
    def check(shard: Shard) -> tuple[Shard, Counter[str], str | None]:
        try:
            return shard, _check_part(paths, manifest, plan, shard), None
        except FileNotFoundError:
            return shard, Counter(), "is gone"
        except PartDamaged as error:
            return shard, Counter(), str(error)

    shards = (shard for shard in plan if shard.id not in pending)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for batch in _batches(shards, 64):
            for shard, states, problem in pool.map(check, batch):
                verdict.shards_checked += 1
                verdict.states.update(states)
                if problem is not None:
                    file = paths.part(shard.id)
                    verdict.findings.append(Finding(file, problem, REDO_ADVICE, shard.id))


def _check_gone(paths: RunPaths, pending: dict[str, Shard], verdict: Verdict) -> None:
    """Parts that were there: the log of events remembers them, or the record of a redone shard."""
    committed: set[str] = set()
    for event in read_events(paths):
        if event.get("kind") == "commit":
            committed.add(event["shard"])
        elif event.get("kind") == "repair":
            committed.discard(event["shard"])
    for id_, shard in pending.items():
        if is_committed(paths, shard) if shard.revision else id_ in committed:
            verdict.findings.append(Finding(paths.part(id_), "is gone", REDO_ADVICE, id_))


def _check_journals(
    paths: RunPaths, manifest: Manifest, pending: dict[str, Shard], verdict: Verdict
) -> None:
    """A journal that does not hold to its end costs its last answers, and is no damage."""
    for folder in paths.storage.folders(paths.journals_folder):
        if folder in pending:
            shard = pending[folder]
            state = read_journals(paths, shard.id, manifest.fingerprint, shard.revision)
            for file in state.torn:
                note = f"{file} does not hold to its end: what is lost there is answered again"
                verdict.notes.append(note)


def _batches(shards: Iterator[Shard], size: int) -> Iterator[list[Shard]]:
    while batch := list(islice(shards, size)):
        yield batch


def _check_part(paths: RunPaths, manifest: Manifest, plan: Plan, shard: Shard) -> Counter[str]:
    """Raises: PartDamaged saying what is wrong."""
    local = paths.local(paths.part(shard.id))
    data: bytes | Path = local if local is not None else paths.storage.read(paths.part(shard.id))
    info = check_part(data)
    for key, value in expected(shard, manifest.fingerprint).items():
        if getattr(info, key) != value:
            raise PartDamaged(f"its record says {key} {getattr(info, key)!r}, the plan {value!r}")
    if not plan.is_same_file(info.input.get("path", ""), shard.path):
        raise PartDamaged(f"it was made from {info.input.get('path')!r}, not {shard.path!r}")
    planned = {"start": shard.start, "stop": shard.stop, "fingerprint": shard.fingerprint}
    for key, value in planned.items():
        if info.input.get(key) != value:
            raise PartDamaged(
                f"it was made from input {key} {info.input.get(key)!r}, not {value!r}"
            )
    table = read_part(data)
    if manifest.output_schema and table.schema.remove_metadata().to_string() != (
        manifest.output_schema
    ):
        raise PartDamaged("its columns are not the job's")
    states = _check_rows(table)
    if {state: states[state] for state in STATES} != dict(info.states):
        raise PartDamaged(f"it holds {dict(states)} and says {info.states}")
    return states


def _check_rows(table: pa.Table) -> Counter[str]:
    states: Counter[str] = Counter()
    columns = (table.column(name).to_pylist() for name in ("row_id", "status", "error_code"))
    for row_id, state, code in zip(*columns, strict=True):
        if row_id is None or state not in STATES:
            raise PartDamaged(f"a row has id {row_id!r} and status {state!r}")
        if (state == FAILED) != (code is not None) or (state == FAILED and code not in CODES):
            raise PartDamaged(f"row {row_id!r} is {state} with error code {code!r}")
        states[state] += 1
    _check_answers(table)
    return states


def _check_answers(table: pa.Table) -> None:
    """A row that is ok has an answer to every prompt."""
    ok = pa.compute.equal(table.column("status"), OK)
    answered = table.filter(ok)
    for field_ in table.schema.field("meta").type:
        prompt = field_.name
        reasons = pa.compute.struct_field(answered.column("meta"), [prompt, "finish_reason"])
        if reasons.null_count:
            raise PartDamaged(f"a row that is ok has no answer to {prompt!r}")


def _check_input(manifest: Manifest, plan: Plan, verdict: Verdict) -> None:
    """The plan holds each row of the input once; what cannot be read is a note."""
    from jobs.job import open_config_source

    config = manifest.job_config()
    limit = config.input.limit
    if limit is not None and plan.num_rows > limit:  # a later run was allowed more
        raised = config.input.model_copy(update={"limit": plan.num_rows})
        config = config.model_copy(update={"input": raised})
    try:
        source = open_config_source(config)
        files = source.files()
        changed = plan.changed(files, source.still_holds)
    except (UserError, OSError) as error:
        _tell_unreadable(plan, error, verdict)
        return
    verdict.rows_input = sum(file.num_rows for file in files)
    known = plan.files()
    for name in changed:
        advice = "Put it back, or run the job with --changed redo."
        verdict.findings.append(Finding(name, "has changed since it was planned", advice))
    for name in plan.missing(files):
        verdict.notes.append(f"{name} is planned and no longer in the input")
    news = sum(f.num_rows - (known[f.path][-1].stop if f.path in known else 0) for f in files)
    if news > 0 and not changed:
        verdict.rows_left += news
        verdict.notes.append(f"the input has {news} new rows: run the job again")


def _tell_unreadable(plan: Plan, error: Exception, verdict: Verdict) -> None:
    """An input that is no longer there is nobody's fault; one that is there and damaged is."""
    there = next((path for path in plan.files() if os.path.isfile(path)), None)
    if there is None:
        verdict.notes.append(f"the input cannot be looked at: {error}")
        return
    file = next((path for path in plan.files() if path in str(error)), there)
    advice = "Put it back as it was when its rows were planned."
    verdict.findings.append(Finding(file, f"cannot be read ({error})", advice))
