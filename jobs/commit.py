"""The commit of a shard: its part appears whole, once, whoever else tries the same.

The one step that decides is exclusive (`storage.publish_exclusive`). A redone shard (revision > 0)
replaces its part: there the exclusive step is a small file in `redo/` that names the winner, and
the winner's part is then moved over the old one. Knows nothing of leases.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from jobs.faults import fault
from jobs.part import PartDamaged, PartInfo, footer_size, read_info, write_part
from jobs.paths import RunPaths, part_shard, shard_id, shard_number
from jobs.plan import Plan, Shard
from jobs.storage import StorageError
from jobs.table import count_states

log = logging.getLogger(__name__)
NUM_TRIES = 3
REDO_PREFIX = "redo-"  # of private files that nobody may clear away
FOOTER_BYTES = 64 << 10  # read at once in the hope that a part's footer is in it


def commit_shard(
    paths: RunPaths,
    shard: Shard,
    table: pa.Table,
    *,
    attempt: str,
    fingerprint: str,
    compression: str = "zstd",
) -> bool:
    """Make an attempt's table the shard's part; False when another attempt's is there already.

    Raises: StorageError; the shard is then as it was, or committed by this attempt.
    """
    if table.num_rows != shard.num_rows:
        raise AssertionError(f"{shard.id}: {table.num_rows} rows for {shard.num_rows}")
    info = PartInfo(
        shard=shard.id,
        attempt=attempt,
        fingerprint=fingerprint,
        num_rows=table.num_rows,
        states=count_states(table),
        revision=shard.revision,
        input={"path": shard.path, "start": shard.start, "stop": shard.stop,
               "fingerprint": shard.fingerprint},
    )  # fmt: skip
    fault("commit.before_build")
    for _ in range(NUM_TRIES):
        try:
            private = _write(paths, shard, table, info, compression)
            fault("commit.before_link")
            return _publish(paths, shard, info, private)
        except _ClearedError:
            if is_committed(paths, shard):
                return False
    raise StorageError(f"{shard.id}: others clear its private file away, again and again")


def committed_shards(paths: RunPaths) -> set[str]:
    """Shards that have a part, by one listing; the part may be of an older revision."""
    shards = (part_shard(name) for name in paths.storage.names(paths.data_folder))
    return {shard for shard in shards if shard is not None}


def pending_shards(paths: RunPaths, plan: Plan) -> Iterable[Shard]:
    """Planned shards without a part of their revision, in order: a few listings."""
    for number in sorted(pending_numbers(paths, plan)):
        yield plan.shard(shard_id(number))


def pending_numbers(paths: RunPaths, plan: Plan) -> set[int]:
    """The same as shard numbers."""
    if plan.has_revisions:
        finish_redos(paths)
    pending = set(plan.numbers()) - {shard_number(shard) for shard in committed_shards(paths)}
    if plan.has_revisions:
        redone = redone_shards(paths)
        pending |= {
            shard_number(shard.id) for shard in plan if redone.get(shard.id, 0) < shard.revision
        }
    return pending


def is_committed(paths: RunPaths, shard: Shard) -> bool:
    """Whether the shard needs no more work: one look."""
    if shard.revision:
        finish_redo(paths, shard.id, shard.revision)
        return paths.storage.exists(paths.redo(shard.id, shard.revision))
    return paths.storage.exists(paths.part(shard.id))


def redone_shards(paths: RunPaths) -> dict[str, int]:
    """The highest revision that an attempt has won, by shard."""
    newest: dict[str, int] = {}
    for name in paths.storage.names(paths.redo_folder):
        shard, _, rest = name.partition(".")
        revision = int(rest.removesuffix(".json"))
        newest[shard] = max(revision, newest.get(shard, 0))
    return newest


def finish_redo(paths: RunPaths, shard: str, revision: int) -> bool:
    """Bring a won revision's part into place if its winner could not; True when it was done now."""
    if not paths.is_local:
        return False
    try:
        won = json.loads(paths.storage.read(paths.redo(shard, revision)))
    except (FileNotFoundError, ValueError):  # a damaged one: `verify` looks at the part itself
        return False
    private = Path(paths.url(won["private"]))
    return private.exists() and paths.storage.publish_replace(private, paths.part(shard))


def finish_redos(paths: RunPaths) -> None:
    """Finish all redone shards whose winner died before its part was visible: two listings."""
    if not paths.is_local:
        return
    names = paths.storage.names(paths.private_folder)
    waiting = {name.removeprefix(REDO_PREFIX).split(".", 1)[0] for name in names}
    for shard, revision in redone_shards(paths).items():
        if shard in waiting:
            finish_redo(paths, shard, revision)


def part_info(paths: RunPaths, shard: str) -> PartInfo:
    """A committed part's record. Raises: FileNotFoundError, PartDamaged."""
    local = paths.local(paths.part(shard))
    if local is not None:
        return read_info(local)
    tail = paths.storage.tail(paths.part(shard), FOOTER_BYTES)
    if (size := footer_size(tail)) > len(tail):
        tail = paths.storage.tail(paths.part(shard), size)
    return read_info(tail)


def clean_private(paths: RunPaths, shard: str) -> None:
    """Delete unfinished files that earlier attempts at a shard left behind."""
    if not paths.is_local:
        return
    finish_redo(paths, shard, redone_shards(paths).get(shard, 0))
    for name in paths.storage.names(paths.private_folder):
        if name.startswith(f"{shard}."):
            paths.storage.delete(f"{paths.private_folder}/{name}")


class _ClearedError(Exception):
    """Whoever took the shard over from this attempt, which slept, has deleted its private file."""


def _write(
    paths: RunPaths, shard: Shard, table: pa.Table, info: PartInfo, compression: str
) -> Path:
    """The part as a synced private file."""
    private = paths.storage.make_private(paths.private(shard.id, info.attempt))
    paths.storage.make_private(paths.part(shard.id))
    try:
        fault("commit.before_write")
        write_part(private, table, info, compression)
        fault("commit.after_write")
        paths.storage.sync_file(private)
    except FileNotFoundError as error:
        raise _ClearedError from error
    except (OSError, StorageError) as error:
        private.unlink(missing_ok=True)
        raise StorageError(f"writing the part of {shard.id} failed: {error}") from error
    return private


def _publish(paths: RunPaths, shard: Shard, info: PartInfo, private: Path) -> bool:
    if shard.revision:
        replace = _replace_local if paths.is_local else _replace_remote
        return replace(paths, shard, info, private)
    made = paths.storage.publish_exclusive(private, paths.part(shard.id))
    fault("commit.after_link")
    if not made and not is_committed(paths, shard):
        raise _ClearedError
    return made or _is_ours(paths, shard, info.attempt)


def _replace_local(paths: RunPaths, shard: Shard, info: PartInfo, private: Path) -> bool:
    """Decide the winner of a revision, then put its part in the old one's place.

    A rename consumes the winner's private file, so it happens once: an attempt that sleeps between
    the two steps and wakes after later revisions finds its file gone.
    """
    safe = private.with_name(f"{REDO_PREFIX}{private.name}")
    try:
        private.rename(safe)
    except FileNotFoundError as error:
        raise _ClearedError from error
    won = {"attempt": info.attempt, "private": f"{paths.private_folder}/{safe.name}"}
    name = paths.redo(shard.id, shard.revision)
    if not paths.storage.write_exclusive(name, json.dumps(won).encode()):
        safe.unlink(missing_ok=True)
        finish_redo(paths, shard.id, shard.revision)
        return False
    fault("commit.before_replace")
    paths.storage.publish_replace(safe, paths.part(shard.id))
    fault("commit.after_replace")
    return True


def _replace_remote(paths: RunPaths, shard: Shard, info: PartInfo, private: Path) -> bool:
    """Put the part in place of an older revision's, then note it in `redo/` for listings."""
    name = paths.part(shard.id)
    token = paths.storage.token(name)
    made = False
    if token is None:
        made = paths.storage.publish_exclusive(private, name)
    elif part_info(paths, shard.id).revision < shard.revision:
        fault("commit.before_replace")
        made = paths.storage.publish_replace(private, name, token)
        fault("commit.after_replace")
    private.unlink(missing_ok=True)
    if made or part_info(paths, shard.id).revision >= shard.revision:
        won = json.dumps({"attempt": info.attempt}).encode()
        paths.storage.write_exclusive(paths.redo(shard.id, shard.revision), won)
    return made


def _is_ours(paths: RunPaths, shard: Shard, attempt: str) -> bool:
    """Whether the part that stood in the way is this attempt's own, from a try that seemed lost."""
    try:
        return part_info(paths, shard.id).attempt == attempt
    except (FileNotFoundError, PartDamaged):
        return False
