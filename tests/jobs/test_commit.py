"""The commit: one attempt of many wins, readers see whole files, disks may fail, redo replaces."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import faults
from jobs.commit import (
    clean_private,
    commit_shard,
    committed_shards,
    finish_redos,
    is_committed,
    part_info,
    pending_shards,
    redone_shards,
)
from jobs.part import check_part
from jobs.paths import RunPaths
from jobs.plan import Shard, grow_plan, redo_shards
from jobs.redo import kept_answers
from jobs.storage import StorageError
from jobs.table import build_table, output_schema
from pipeline.errors import RowError
from pipeline.rows import Answer, RequestKey
from tests.helpers.run_folder import (
    SHARD,
    File,
    Kept,
    answer,
    commit,
    make_config,
    shard_table,
    tree,
)

SHARED = [f"commit.{step}" for step in ("before_build", "before_write", "after_write")]
STEPS = [
    *((point, revision) for point in (*SHARED, "commit.before_link") for revision in (0, 1)),
    ("commit.after_link", 0),
    ("commit.before_replace", 1),
    ("commit.after_replace", 1),
]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path))


def texts(paths: RunPaths, shard: Shard = SHARD) -> list[str]:
    part = paths.local(paths.part(shard.id))
    assert part is not None
    check_part(part)
    found: list[str] = pq.read_table(part).column("caption").to_pylist()
    return found


def expected(attempt: str, shard: Shard = SHARD) -> list[str]:
    return [f"{attempt} {i}" for i in range(shard.num_rows)]


def test_the_first_attempt_is_kept(paths: RunPaths) -> None:
    assert not is_committed(paths, SHARD)
    assert commit(paths, "a1")
    assert not commit(paths, "a2")
    assert texts(paths) == expected("a1")
    assert is_committed(paths, SHARD)
    assert committed_shards(paths) == {SHARD.id}
    assert tree(paths, "tmp") == []
    info = part_info(paths, SHARD.id)
    assert (info.attempt, info.fingerprint, info.num_rows) == ("a1", "fp", 5)
    assert info.states == {"ok": 5, "failed": 0, "filtered": 0}
    assert info.input == {"path": "in.parquet", "start": 0, "stop": 5, "fingerprint": "f0"}


@settings(max_examples=10, deadline=None)
@given(revision=st.integers(0, 2), num=st.integers(2, 6))
def test_of_racing_attempts_one_says_it_won(
    tmp_path_factory: pytest.TempPathFactory, revision: int, num: int
) -> None:
    paths = RunPaths(str(tmp_path_factory.mktemp("run")))
    for earlier in range(revision):
        assert commit(paths, f"r{earlier}", replace(SHARD, revision=earlier))
    barrier, won, seen = threading.Barrier(num + 1), [], set()

    def run(attempt: str) -> None:
        barrier.wait()
        if commit(paths, attempt, replace(SHARD, revision=revision)):
            won.append(attempt)

    threads = [threading.Thread(target=run, args=(f"a{i}",)) for i in range(num)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while any(thread.is_alive() for thread in threads):
        if committed_shards(paths):
            seen.add(texts(paths)[0].split()[0])  # a reader sees whole parts only
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert texts(paths) == expected(won[0])
    assert seen <= {won[0], f"r{revision - 1}"}


def test_rows_must_be_all_there(paths: RunPaths) -> None:
    with pytest.raises(AssertionError, match="4 rows for 5"):
        commit_shard(
            paths, SHARD, shard_table(replace(SHARD, stop=4)), attempt="a", fingerprint="fp"
        )


@pytest.mark.parametrize(("point", "revision"), STEPS)
def test_a_kill_at_any_point_then_another_attempt(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, point: str, revision: int
) -> None:
    shard = replace(SHARD, revision=revision)
    if revision:
        commit(paths, "a0")
    monkeypatch.setenv(faults.ENV, f"{point}:kill")
    faults.reset()
    pid = os.fork()
    if pid == 0:
        commit(paths, "a1", shard)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 9
    monkeypatch.delenv(faults.ENV)
    assert not revision or texts(paths) in (expected("a0"), expected("a1"))
    clean_private(paths, shard.id)
    if not is_committed(paths, shard):
        assert commit(paths, "a2", shard)
    assert texts(paths) in (expected("a1"), expected("a2"))
    assert not commit(paths, "a3", shard)
    assert part_info(paths, shard.id).revision == revision
    assert tree(paths, "tmp") == []


@pytest.mark.parametrize("point", ["commit.before_write", "commit.after_write"])
@pytest.mark.parametrize("action", ["enospc", "eio", "edquot", "erofs"])
def test_a_failing_disk_commits_nothing(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    monkeypatch.setenv(faults.ENV, f"{point}:{action}")
    faults.reset()
    with pytest.raises(StorageError, match="injected"):
        commit(paths, "a1")
    assert committed_shards(paths) == set()
    assert tree(paths, "tmp") == []
    assert commit(paths, "a2")


def test_a_real_full_disk_commits_nothing(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        commit(paths, "a1")
    monkeypatch.undo()
    assert committed_shards(paths) == set()


def test_pending_follows_plan_and_revisions(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("in.parquet", 12)], 5)
    first, second, third = plan
    assert list(pending_shards(paths, plan)) == [first, second, third]
    commit(paths, "a1", first)
    commit(paths, "a1", third)
    assert list(pending_shards(paths, plan)) == [second]
    plan = redo_shards(paths, [first.id])
    assert [(s.id, s.revision) for s in pending_shards(paths, plan)] == [
        (first.id, 1), (second.id, 0),
    ]  # fmt: skip
    assert commit(paths, "a2", plan.shard(first.id))
    assert list(pending_shards(paths, plan)) == [second]
    assert redone_shards(paths) == {first.id: 1}
    assert texts(paths, first) == expected("a2", first)


def test_a_winner_that_wakes_late_changes_nothing(paths: RunPaths) -> None:
    """Its part was put into place by others, then a later revision replaced it."""
    commit(paths, "a0")
    publish = paths.storage.publish_replace
    asleep: list[tuple[Path, str]] = []
    paths.storage.publish_replace = (  # type: ignore[method-assign]
        lambda local, name, token=None: asleep.append((local, name)) or True
    )
    assert commit(paths, "a1", replace(SHARD, revision=1))
    paths.storage.publish_replace = publish  # type: ignore[method-assign]
    assert texts(paths) == expected("a0")
    finish_redos(paths)
    assert texts(paths) == expected("a1")
    assert commit(paths, "a2", replace(SHARD, revision=2))
    assert not paths.storage.publish_replace(*asleep[0])
    assert texts(paths) == expected("a2")


@pytest.mark.parametrize("point", ["commit.after_write", "commit.before_link"])
@pytest.mark.parametrize("revision", [0, 1])
@pytest.mark.parametrize("committed", [False, True])
def test_a_private_file_that_another_attempt_cleared_away(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, point: str, revision: int, committed: bool
) -> None:
    """Taken over while it slept: it writes anew, or finds that the other one was quicker."""
    if revision:
        commit(paths, "a0")
    shard = replace(SHARD, revision=revision)
    others = [lambda: clean_private(paths, SHARD.id)]
    if committed:
        others.append(lambda: commit(paths, "a2", shard))

    def take_over(name: str) -> None:
        while name == point and others:
            others.pop(0)()

    monkeypatch.setattr("jobs.commit.fault", take_over)
    assert commit(paths, "a1", shard) is not committed
    assert texts(paths) == expected("a2" if committed else "a1")
    assert is_committed(paths, shard)
    assert part_info(paths, SHARD.id).revision == revision


def test_a_retry_keeps_what_was_answered(paths: RunPaths) -> None:
    grow_plan(paths, [File("in.parquet", 4)], 5)
    shard = replace(SHARD, stop=4)
    answers = {(i, "caption"): answer(shard.id, i) for i in range(4)}
    for row, code in ((1, "out_of_memory"), (2, "bad_prompt"), (3, "remote_failed")):
        key = RequestKey(shard.id, row, "caption")
        answers[row, "caption"] = Answer.failed(key, RowError(code))
    made_by = dict.fromkeys(answers, "a1")
    rows = [Kept(str(i)) for i in range(4)]
    table = build_table(output_schema(make_config(), None), rows, answers, made_by)
    assert commit_shard(paths, shard, table, attempt="a1", fingerprint="fp")

    plan = redo_shards(paths, [shard.id], codes=["bad_prompt"])
    plan = redo_shards(paths, [shard.id], codes=["out_of_memory"])
    again = plan.shard(shard.id)
    kept, kept_by = kept_answers(paths, plan, again)
    assert kept == {key: answers[key] for key in ((0, "caption"), (3, "caption"))}
    assert set(kept_by.values()) == {"a1"}
    assert kept_answers(paths, plan, shard) == ({}, {})
    assert kept_answers(paths, plan, replace(again, fingerprint="f1")) == ({}, {})

    assert commit_shard(paths, again, table, attempt="a2", fingerprint="fp")
    plan = redo_shards(paths, [shard.id])
    assert kept_answers(paths, plan, plan.shard(shard.id)) == ({}, {})
    plan = redo_shards(paths, [shard.id], codes=["out_of_memory"])
    assert kept_answers(paths, plan, plan.shard(shard.id)) == ({}, {})  # all were asked for before

    part = paths.local(paths.part(shard.id))
    assert part is not None
    part.write_bytes(part.read_bytes()[:-9])
    assert kept_answers(paths, plan, plan.shard(shard.id)) == ({}, {})
    part.unlink()
    assert kept_answers(paths, plan, plan.shard(shard.id)) == ({}, {})


def test_leftovers_are_cleaned_and_others_stay(paths: RunPaths) -> None:
    for name in (f"{SHARD.id}.a1.parquet.tmp", "shard-00000001.a1.parquet.tmp"):
        paths.storage.make_private(f"tmp/{name}").touch()
    clean_private(paths, SHARD.id)
    assert tree(paths, "tmp") == ["shard-00000001.a1.parquet.tmp"]
