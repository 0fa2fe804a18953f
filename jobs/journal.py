"""The journal of one attempt at one shard: finished answers in checksummed records.

A record is `length, crc, payload`; reading stops at the first that does not hold, so a torn tail
costs what was in it and nothing else. Each attempt writes a journal of its own and reads those of
all earlier ones. Knows nothing of leases and of how a shard is committed.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.faults import fault, kill_self
from jobs.paths import DEATH_SUFFIX, RunPaths, journal_revision
from jobs.storage import StorageError
from pipeline.rows import Answer, RequestKey

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 1 << 30
_HEAD = struct.Struct("<II")  # payload bytes, crc32 of length and payload

AnswerKey = tuple[int, str]  # (row index in the shard, prompt)


@dataclass
class JournalState:
    """What the journals of a shard hold."""

    answers: dict[AnswerKey, Answer] = field(default_factory=dict)
    made_by: dict[AnswerKey, str] = field(default_factory=dict)  # attempt of each answer
    attempts: list[str] = field(default_factory=list)  # that left a journal, oldest name first
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (attempt, note)
    died: set[str] = field(default_factory=set)  # attempts that a runner saw die
    torn: list[str] = field(default_factory=list)  # files that do not hold to their end


class JournalWriter:
    """Appends one attempt's records; synced at least every `interval_sec` by a thread of its own.

    `append` hands a record to the operating system at once where files can be appended to: then
    only a dying machine, not a dying process, costs what was not yet synced. On an object store
    records wait in memory and go up as one segment each interval. Thread-safe.
    """

    def __init__(
        self,
        paths: RunPaths,
        shard: str,
        attempt: str,
        fingerprint: str,
        revision: int = 0,
        interval_sec: float = 30.0,
    ) -> None:
        self.attempt = attempt
        self.num_appended = 0
        sink = _FileSink if paths.is_local else _SegmentSink
        self._sink: _FileSink | _SegmentSink = sink(paths, shard, attempt, revision)
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._interval_sec = interval_sec
        header = {
            "kind": "head",
            "schema_version": SCHEMA_VERSION,
            "shard": shard,
            "attempt": attempt,
            "fingerprint": fingerprint,
            "revision": revision,
        }
        self._write(header)
        self._sink.sync()
        self._thread = threading.Thread(target=self._keep_synced, name="journal", daemon=True)
        self._thread.start()

    def append(self, answer: Answer) -> None:
        """Write one answer. Raises: StorageError, also for an earlier sync that failed."""
        self._write(_pack_answer(answer))
        self.num_appended += 1

    def note(self, **values: Any) -> None:
        """Write what a later attempt should know (how this one ended, what it was at)."""
        self._write({"kind": "note", **values})

    def flush(self) -> None:
        """Sync now. Raises: StorageError."""
        with self._lock:
            self._raise_earlier()
            self._sync()

    def close(self) -> None:
        """Sync and close. Raises: StorageError."""
        self._closed.set()
        with self._lock:
            try:
                self._raise_earlier()
                self._sync()
            finally:
                self._sink.close()
        self._thread.join()

    def abandon(self) -> None:
        """Close without a word: the attempt has failed or its shard is committed."""
        self._closed.set()
        with self._lock:
            self._sink.close()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self.abandon()

    def _write(self, payload: dict[str, Any]) -> None:
        record = pack_record(payload)
        with self._lock:
            self._raise_earlier()
            try:
                fault("journal.before_append")
                self._sink.write(record)
                fault("journal.after_append")
            except OSError as error:
                self._error = StorageError(f"writing the journal failed: {error}")
                raise self._error from error

    def _sync(self) -> None:
        try:
            self._sink.sync()
        except (OSError, StorageError) as error:
            self._error = StorageError(f"syncing the journal failed: {error}")
            raise self._error from error

    def _raise_earlier(self) -> None:
        if self._error is not None:
            raise StorageError(str(self._error)) from self._error

    def _keep_synced(self) -> None:
        while not self._closed.wait(self._interval_sec):
            with self._lock:
                if self._closed.is_set() or self._error is not None:
                    return
                try:
                    self._sync()
                except StorageError as error:
                    log.error("%s", error)
                    return


class _FileSink:
    """Appends to one file."""

    def __init__(self, paths: RunPaths, shard: str, attempt: str, revision: int) -> None:
        fault("journal.before_open")
        storage = paths.storage
        path = storage.make_private(paths.journal(shard, attempt, revision))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        for last_try in (False, True):
            try:
                self._fd = os.open(path, flags, 0o644)
                break
            except FileNotFoundError:  # an attempt that has just committed took the folder away
                if last_try:
                    raise
                storage.make_private(paths.journal(shard, attempt, revision))
            except OSError as error:
                raise StorageError(f"creating {path} failed: {error}") from error
        self._num_good = 0
        self._num_unsynced = 0

    def write(self, record: bytes) -> None:
        try:
            if fault("journal.append") == "torn":
                os.write(self._fd, record[: len(record) // 2])
                kill_self()
            view = memoryview(record)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            # NOTE: half a record must not stand before the next one, or a reader stops there.
            os.ftruncate(self._fd, self._num_good)
            raise
        self._num_good += len(record)
        self._num_unsynced += len(record)

    def sync(self) -> None:
        if not self._num_unsynced:
            return
        fault("journal.sync")
        os.fsync(self._fd)
        self._num_unsynced = 0
        fault("journal.after_sync")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _SegmentSink:
    """Collects records and writes each interval's as an object of their own."""

    def __init__(self, paths: RunPaths, shard: str, attempt: str, revision: int) -> None:
        fault("journal.before_open")
        self._paths = paths
        self._of = (shard, attempt, revision)
        self._records: list[bytes] = []
        self._num_segments = 0

    def write(self, record: bytes) -> None:
        fault("journal.append")
        self._records.append(record)

    def sync(self) -> None:
        if not self._records:
            return
        fault("journal.sync")
        name = self._paths.journal(*self._of, self._num_segments)
        self._paths.storage.replace(name, b"".join(self._records))
        self._records.clear()
        self._num_segments += 1
        fault("journal.after_sync")

    def close(self) -> None:
        self._records.clear()


def read_journals(paths: RunPaths, shard: str, fingerprint: str, revision: int = 0) -> JournalState:
    """What all attempts at a shard have left; journals of another fingerprint are passed over.

    Two attempts may have answered the same prompt: the earlier name's answer counts, but a failed
    one gives way to one that is not. An attempt that notes `void` has answered rows of an input
    that was changed under it: its answers count for nothing.
    """
    state = JournalState()
    folder = paths.journal_folder(shard)
    listed = paths.storage.names(folder)
    state.died = {n.removesuffix(DEATH_SUFFIX) for n in listed if n.endswith(DEATH_SUFFIX)}
    for attempt, names in _by_attempt(listed):
        state.attempts.append(attempt)
        records, torn = _read_attempt(paths, folder, names)
        if torn is not None:
            state.torn.append(torn)
        head = records[0] if records else {}
        if not _belongs(head, shard, fingerprint, revision):
            continue
        is_void = any(record.get("void") for record in records)
        for record in records:
            if record["kind"] != "answer" or not is_void:
                _apply(state, attempt, record)
    return state


def pack_record(payload: dict[str, Any]) -> bytes:
    """One record's bytes."""
    data = json.dumps(payload, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    size = len(data).to_bytes(4, "little")
    return _HEAD.pack(len(data), zlib.crc32(data, zlib.crc32(size))) + data


def read_records(data: bytes) -> Iterator[dict[str, Any]]:
    """Records up to the first that is torn or damaged; returns how many bytes held."""
    offset = 0
    while offset + _HEAD.size <= len(data):
        size, crc = _HEAD.unpack_from(data, offset)
        start, end = offset + _HEAD.size, offset + _HEAD.size + size
        if size > MAX_RECORD_BYTES or end > len(data):
            break
        payload = data[start:end]
        if zlib.crc32(payload, zlib.crc32(data[offset : offset + 4])) != crc:
            break
        yield json.loads(payload)
        offset = end
    if offset != len(data):
        yield {"kind": "torn", "at": offset}


def delete_journals(paths: RunPaths, shard: str, revision: int = 0) -> None:
    """Drop the journals of a shard that is committed; those of a later revision stay."""
    fault("commit.before_clean")
    folder = paths.journal_folder(shard)
    names = paths.storage.names(folder)
    old = [name for name in names if _revision(name) <= revision]
    if old == names:
        paths.storage.delete_folder(folder)
    else:
        for name in old:
            paths.storage.delete(f"{folder}/{name}")
    fault("commit.after_clean")


def count_journaled(paths: RunPaths, shard: str, fingerprint: str, revision: int = 0) -> int:
    """How many answers a later attempt would find."""
    return len(read_journals(paths, shard, fingerprint, revision).answers)


def _revision(name: str) -> int:
    return journal_revision(name) if name.endswith(".journal") else 0


def _by_attempt(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Journal files by attempt; an attempt's segments in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".journal"):
            groups.setdefault(name.split(".", 1)[0], []).append(name)
    return sorted((attempt, sorted(files)) for attempt, files in groups.items())


def _read_attempt(
    paths: RunPaths, folder: str, names: Sequence[str]
) -> tuple[list[dict[str, Any]], str | None]:
    """The records up to the first that does not hold, and the file where that was."""
    records: list[dict[str, Any]] = []
    for name in names:
        fault("journal.read")
        try:
            data = paths.storage.read(f"{folder}/{name}")
        except FileNotFoundError:  # the shard is committed, its journals are going
            return records, None
        for record in read_records(data):
            if record["kind"] == "torn":
                log.info("%s/%s: tail cut at byte %d", folder, name, record["at"])
                return records, f"{folder}/{name}"
            records.append(record)
    return records, None


def _belongs(head: dict[str, Any], shard: str, fingerprint: str, revision: int) -> bool:
    found = (head.get("kind"), head.get("shard"), head.get("fingerprint"), head.get("revision"))
    return found == ("head", shard, fingerprint, revision)


def _apply(state: JournalState, attempt: str, record: dict[str, Any]) -> None:
    if record["kind"] == "note":
        note = {key: value for key, value in record.items() if key != "kind"}
        state.notes.append((attempt, note))
        return
    if record["kind"] != "answer":
        return
    answer = _unpack_answer(record)
    key = (answer.key.row, answer.key.prompt)
    known = state.answers.get(key)
    if known is None or (known.error_code is not None and answer.error_code is None):
        state.answers[key] = answer
        state.made_by[key] = attempt


_COUNTS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
_TEXTS = ("text", "finish_reason", "error_code", "error")


def _pack_answer(answer: Answer) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": "answer", "key": list(answer.key)}
    record["counts"] = [getattr(answer, name) for name in _COUNTS]
    for name in _TEXTS:
        if (value := getattr(answer, name)) is not None:
            record[name] = value
    return record


def _unpack_answer(record: dict[str, Any]) -> Answer:
    counts = dict(zip(_COUNTS, record["counts"], strict=True))
    texts: dict[str, Any] = {name: record.get(name) for name in _TEXTS}
    return Answer(key=RequestKey(*record["key"]), **texts, **counts)
