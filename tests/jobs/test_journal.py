"""The journal: what was appended comes back; what is torn or damaged costs itself and no more."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import faults
from jobs.journal import (
    JournalWriter,
    count_journaled,
    delete_journals,
    pack_record,
    read_journals,
    read_records,
)
from jobs.paths import RunPaths
from jobs.storage import StorageError
from pipeline.errors import RowError
from pipeline.rows import Answer, RequestKey
from tests.helpers.run_folder import answer

SHARD = "shard-00000003"


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path))


def write(paths: RunPaths, attempt: str, *answers: Answer, fingerprint: str = "fp") -> Path:
    with JournalWriter(paths, SHARD, attempt, fingerprint) as journal:
        for one in answers:
            journal.append(one)
    found = paths.local(paths.journal(SHARD, attempt))
    assert found is not None
    return found


ANSWERS = st.builds(
    Answer,
    key=st.builds(RequestKey, st.just(SHARD), st.integers(0, 9), st.sampled_from("abc")),
    text=st.none() | st.text() | st.just("\ud800 lone"),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    num_prompt_tokens=st.integers(0, 10**6),
    num_cached_tokens=st.integers(0, 10**6),
    num_output_tokens=st.integers(0, 10**6),
    error_code=st.sampled_from([None, "out_of_memory"]),
    error=st.none() | st.text(),
)


@given(st.lists(ANSWERS, max_size=8))
@settings(max_examples=40, deadline=None)
def test_answers_come_back(tmp_path_factory: pytest.TempPathFactory, given_: list[Answer]) -> None:
    paths = RunPaths(str(tmp_path_factory.mktemp("run")))
    write(paths, "a1", *given_)
    expected: dict[tuple[int, str], Answer] = {}
    for one in given_:
        key = (one.key.row, one.key.prompt)
        known = expected.get(key)
        if known is None or (known.error_code and not one.error_code):
            expected[key] = one
    state = read_journals(paths, SHARD, "fp")
    assert state.answers == expected
    assert state.made_by == dict.fromkeys(expected, "a1")
    assert not state.torn


RECORDS = [{"kind": "note", "i": i, "text": "é" * (i % 5)} for i in range(6)]
DATA = b"".join(map(pack_record, RECORDS))
ENDS = [len(b"".join(map(pack_record, RECORDS[:n]))) for n in range(len(RECORDS) + 1)]


@given(cut=st.integers(0, len(DATA)), junk=st.binary(max_size=20))
def test_a_torn_tail_is_cut_at_the_last_whole_record(cut: int, junk: bytes) -> None:
    found = [r for r in read_records(DATA[:cut] + junk) if r["kind"] != "torn"]
    num_whole = max(n for n, end in enumerate(ENDS) if end <= cut)
    assert found[:num_whole] == RECORDS[:num_whole]
    assert found == RECORDS[: len(found)]  # junk may happen to continue the cut record


@given(at=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_costs_its_record_and_what_follows(at: int, bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[at] ^= 1 << bit
    found = list(read_records(bytes(damaged)))
    num_before = max(n for n, end in enumerate(ENDS) if end <= at)
    assert found == [*RECORDS[:num_before], {"kind": "torn", "at": ENDS[num_before]}]


def test_zeros_at_the_end_are_no_records() -> None:
    found = list(read_records(DATA + bytes(4096)))
    assert found[:-1] == RECORDS
    assert found[-1]["kind"] == "torn"


def test_several_attempts_add_up(paths: RunPaths) -> None:
    key = RequestKey(SHARD, 2, "caption")
    failed = Answer.failed(key, RowError("out_of_memory"))
    write(paths, "a1", answer(SHARD, 0, text="first"), failed)
    write(paths, "a2", answer(SHARD, 0, text="second"), answer(SHARD, 1), answer(SHARD, 2))
    state = read_journals(paths, SHARD, "fp")
    assert state.answers[0, "caption"].text == "first"
    assert state.answers[2, "caption"].error_code is None
    assert state.made_by == {(0, "caption"): "a1", (1, "caption"): "a2", (2, "caption"): "a2"}
    assert state.attempts == ["a1", "a2"]
    assert count_journaled(paths, SHARD, "fp") == 3
    delete_journals(paths, SHARD)
    assert count_journaled(paths, SHARD, "fp") == 0
    assert paths.storage.folders(paths.journals_folder) == []


def test_journals_of_other_jobs_are_passed_over(paths: RunPaths) -> None:
    write(paths, "a1", answer(SHARD, 0), fingerprint="other")
    assert read_journals(paths, SHARD, "fp").answers == {}
    with JournalWriter(paths, SHARD, "a2", "fp", revision=1) as journal:
        journal.append(answer(SHARD, 0))
    assert read_journals(paths, SHARD, "fp").answers == {}
    assert len(read_journals(paths, SHARD, "fp", revision=1).answers) == 1


def test_a_head_that_is_damaged_costs_the_journal(paths: RunPaths) -> None:
    file = write(paths, "a1", answer(SHARD, 0))
    data = bytearray(file.read_bytes())
    data[12] ^= 1
    file.write_bytes(data)
    state = read_journals(paths, SHARD, "fp")
    assert (state.answers, len(state.torn)) == ({}, 1)


def test_notes_are_kept_by_attempt(paths: RunPaths) -> None:
    with JournalWriter(paths, SHARD, "a1", "fp") as journal:
        journal.note(end="drained")
    assert read_journals(paths, SHARD, "fp").notes == [("a1", {"end": "drained"})]


def test_what_is_appended_survives_the_process_at_once(paths: RunPaths) -> None:
    pid = os.fork()
    if pid == 0:
        journal = JournalWriter(paths, SHARD, "a1", "fp", interval_sec=1000)
        journal.append(answer(SHARD, 0))
        faults.kill_self()
    os.waitpid(pid, 0)
    assert len(read_journals(paths, SHARD, "fp").answers) == 1


def test_a_record_torn_by_a_kill_is_cut(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.ENV, "journal.append:torn:3")
    faults.reset()
    pid = os.fork()
    if pid == 0:
        journal = JournalWriter(paths, SHARD, "a1", "fp")
        for row in range(5):
            journal.append(answer(SHARD, row))
    assert os.waitpid(pid, 0)[1] == 9
    state = read_journals(paths, SHARD, "fp")
    assert list(state.answers) == [(0, "caption")]
    assert len(state.torn) == 1


@pytest.mark.parametrize("point", ["journal.append", "journal.sync", "journal.before_append"])
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_failing_disk_ends_the_writer_not_the_journal(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    journal = JournalWriter(paths, SHARD, "a1", "fp")
    journal.append(answer(SHARD, 0))
    journal.flush()
    monkeypatch.setenv(faults.ENV, f"{point}:{action}")
    faults.reset()

    def more() -> None:
        journal.append(answer(SHARD, 1))
        journal.flush()

    with pytest.raises(StorageError, match="injected"):
        more()
    monkeypatch.delenv(faults.ENV)
    with pytest.raises(StorageError, match="injected"):  # it stays broken
        journal.append(answer(SHARD, 2))
    journal.abandon()
    state = read_journals(paths, SHARD, "fp")
    assert (0, "caption") in state.answers
    assert (2, "caption") not in state.answers
    assert not state.torn


def test_half_a_record_is_taken_back(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalWriter(paths, SHARD, "a1", "fp")
    write_some, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "disk full")
        return write_some(fd, bytes(data)[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="disk full"):
        journal.append(answer(SHARD, 0))
    monkeypatch.undo()
    journal.abandon()
    assert not read_journals(paths, SHARD, "fp").torn


def test_records_are_synced_without_another_append(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    fsync = os.fsync
    journal = JournalWriter(paths, SHARD, "a1", "fp", interval_sec=0.05)
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.set()))
    journal.append(answer(SHARD, 0))
    assert synced.wait(5)
    journal.close()


def test_appends_from_several_threads_do_not_mix(paths: RunPaths) -> None:
    journal = JournalWriter(paths, SHARD, "a1", "fp", interval_sec=0.01)

    def append(base: int) -> None:
        for row in range(base, base + 200):
            journal.append(answer(SHARD, row, text="x" * (row % 97)))

    threads = [threading.Thread(target=append, args=(base,)) for base in (0, 200, 400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    state = read_journals(paths, SHARD, "fp")
    assert sorted(state.answers) == [(row, "caption") for row in range(600)]


def test_a_late_commit_leaves_a_later_revisions_journals(paths: RunPaths) -> None:
    write(paths, "a1", answer(SHARD, 0))
    with JournalWriter(paths, SHARD, "a2", "fp", revision=1) as journal:
        journal.append(answer(SHARD, 1))
    delete_journals(paths, SHARD, revision=0)
    assert read_journals(paths, SHARD, "fp").answers == {}
    assert list(read_journals(paths, SHARD, "fp", revision=1).answers) == [(1, "caption")]
    delete_journals(paths, SHARD, revision=1)
    assert paths.storage.folders(paths.journals_folder) == []


def test_a_folder_that_goes_away_is_made_again(paths: RunPaths) -> None:
    write(paths, "a1", answer(SHARD, 0))
    delete_journals(paths, SHARD)
    write(paths, "a2", answer(SHARD, 1))
    assert list(read_journals(paths, SHARD, "fp").answers) == [(1, "caption")]


def test_a_large_journal_reads_quickly(paths: RunPaths) -> None:
    write(paths, "a1", *(answer(SHARD, row, text="word " * 60) for row in range(4096)))
    start = time.monotonic()
    assert len(read_journals(paths, SHARD, "fp").answers) == 4096
    assert time.monotonic() - start < 2
