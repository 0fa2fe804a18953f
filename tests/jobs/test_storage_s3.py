"""A run folder on S3: the conditional put decides, and the store's bad days are outlived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("moto", reason="needs moto: pip install 'vlm-batch[dev]'")
pytest.importorskip("flask", reason="needs flask: pip install 'vlm-batch[dev]'")
pytest.importorskip("s3fs", reason="needs s3fs: pip install 'vlm-batch[s3]'")

from jobs import storage
from jobs.commit import (
    committed_shards,
    is_committed,
    part_info,
    pending_shards,
    redone_shards,
)
from jobs.journal import JournalWriter, delete_journals, read_journals
from jobs.leases import Leases
from jobs.manifest import open_manifest, require_manifest
from jobs.part import check_part
from jobs.paths import RunPaths
from jobs.plan import grow_plan, redo_shards
from jobs.shard_queue import ShardQueue
from jobs.storage import StorageError
from pipeline.errors import UserError
from tests.helpers.race import race
from tests.helpers.run_folder import SHARD, File, answer, commit, make_config
from tests.helpers.s3_server import S3, environment, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_DELAY_SEC", 0.001)
    server.faults.clear()
    server.requests.clear()
    return server


@pytest.fixture
def paths(s3: S3, request: pytest.FixtureRequest) -> RunPaths:
    return RunPaths(f"s3://bucket/{request.node.name.replace('[', '-').strip(']')}/run")


def test_read_write_list_delete(paths: RunPaths) -> None:
    store = paths.storage
    store.check_writable()
    assert not paths.is_local
    assert store.names("a") == []
    assert store.write_exclusive("a/x", b"1")
    assert not store.write_exclusive("a/x", b"2")
    assert store.write_exclusive("a/x", b"1")  # our own bytes: an earlier try of ours
    first = store.token("a/x")
    store.replace("a/x", b"22")
    assert store.token("a/x") != first
    assert store.read("a/x") == b"22"
    assert store.write_exclusive("a/b/y", b"")
    assert [(e.name, e.num_bytes) for e in store.entries("a")] == [("x", 2)]
    assert store.folders("a") == ["b"]
    store.delete("a/x")
    store.delete("a/x")
    assert store.names("a") == []
    assert store.token("a/x") is None
    with pytest.raises(FileNotFoundError):
        store.read("a/x")


def test_one_of_many_wins(paths: RunPaths) -> None:
    winners = race(12, lambda i: paths.storage.write_exclusive("n", str(i).encode()))
    assert len(winners) == 1
    assert paths.storage.read("n") == str(winners[0]).encode()


def test_the_first_attempt_is_kept(paths: RunPaths) -> None:
    assert race(4, lambda i: commit(paths, f"a{i}")) != []
    assert committed_shards(paths) == {SHARD.id}
    assert is_committed(paths, SHARD)
    info = check_part(paths.storage.read(paths.part(SHARD.id)))
    assert info == part_info(paths, SHARD.id)
    assert not commit(paths, "late")


def test_a_part_in_pieces_is_put_once(
    paths: RunPaths, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.storage_remote._PUT_BYTES", 10)
    assert commit(paths, "a1")
    assert not commit(paths, "a2")
    assert check_part(paths.storage.read(paths.part(SHARD.id))).attempt == "a1"


@pytest.mark.parametrize(
    "code", ["SlowDown", "InternalError", "TooManyRequests", "ConditionalRequestConflict"]
)
def test_refusals_are_tried_again(paths: RunPaths, s3: S3, code: str) -> None:
    for method in ("PUT", "GET", "DELETE"):
        s3.fail(method, "run", code, times=2)
    assert paths.storage.write_exclusive("a/x", b"1")
    assert paths.storage.read("a/x") == b"1"
    paths.storage.delete("a/x")
    assert paths.storage.names("a") == []
    assert s3.faults == []


def test_a_lost_reply_is_no_lost_commit(paths: RunPaths, s3: S3) -> None:
    s3.fail("PUT", "run/data/", "lost")
    assert commit(paths, "a1")
    assert not commit(paths, "a2")
    s3.fail("PUT", "run/n", "lost", times=3)
    assert paths.storage.write_exclusive("n", b"mine")
    s3.fail("PUT", "run/m", "lost", times=1)
    winners = race(6, lambda i: paths.storage.write_exclusive("m", str(i).encode()))
    assert len(winners) == 1


def test_a_cut_body_is_read_again(paths: RunPaths, s3: S3) -> None:
    paths.storage.replace("big", bytes(range(256)) * 1000)
    s3.fail("GET", "run/big", "cut", times=2)
    assert paths.storage.read("big") == bytes(range(256)) * 1000
    assert s3.faults == []


def test_endless_refusals_end_the_attempt(paths: RunPaths, s3: S3) -> None:
    s3.fail("PUT", "run/x", "AccessDenied", times=50)
    with pytest.raises(StorageError, match="writing x in .* failed"):
        paths.storage.write_exclusive("x", b"1")
    s3.fail("PUT", "run/tmp", "AccessDenied", times=50)
    with pytest.raises(UserError, match="cannot be written"):
        paths.storage.check_writable()


def test_a_bucket_that_is_not_there(s3: S3) -> None:
    with pytest.raises(UserError, match=r"s3://nowhere/x cannot be written"):
        RunPaths("s3://nowhere/x").storage.check_writable()


def test_listings_and_single_looks_tell_the_same(paths: RunPaths) -> None:
    paths.storage.replace("a/x", b"1")
    assert [e.token for e in paths.storage.entries("a")] == [paths.storage.token("a/x")]


def test_other_object_stores_open_too() -> None:
    """`memory://` stands for stores without a conditional put: files, not promises."""
    paths = RunPaths("memory://other-stores/run")
    assert commit(paths, "a1")
    assert not commit(paths, "a2")
    assert commit(paths, "a3", replace(SHARD, revision=1))
    assert part_info(paths, SHARD.id).attempt == "a3"
    token = paths.storage.token(paths.part(SHARD.id))
    assert [e.token for e in paths.storage.entries(paths.data_folder)] == [token]


def test_leases(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.leases.is_dead", lambda _: False)
    now = [0.0]
    first, second = (Leases(paths, 100, lambda: now[0]) for _ in range(2))
    lease = first.acquire(SHARD.id)
    assert lease is not None
    assert second.acquire(SHARD.id) is None
    now[0] += 101
    first.beat()
    assert second.acquire(SHARD.id) is None  # it beat
    now[0] += 101
    taken = second.acquire(SHARD.id)
    assert taken is not None
    first.beat()
    assert lease.lost
    first.close()
    second.close()
    assert paths.storage.names(paths.lease_folder) == []


def test_a_journal_in_segments(paths: RunPaths, s3: S3) -> None:
    with JournalWriter(paths, SHARD.id, "a1", "fp") as journal:
        for row in range(4):
            journal.append(answer(SHARD.id, row))
            if row % 2:
                s3.fail("PUT", "journal", "SlowDown")
                journal.flush()
    names = paths.storage.names(paths.journal_folder(SHARD.id))
    assert names == [f"a1.0000.{n:06d}.journal" for n in range(3)]
    with JournalWriter(paths, SHARD.id, "a2", "fp") as journal:
        journal.append(answer(SHARD.id, 4))
    state = read_journals(paths, SHARD.id, "fp")
    assert sorted(state.answers) == [(row, "caption") for row in range(5)]
    assert state.attempts == ["a1", "a2"]
    delete_journals(paths, SHARD.id)
    assert read_journals(paths, SHARD.id, "fp").answers == {}


def test_a_journal_that_cannot_be_written_ends_the_attempt(paths: RunPaths, s3: S3) -> None:
    journal = JournalWriter(paths, SHARD.id, "a1", "fp")
    journal.append(answer(SHARD.id, 0))
    s3.fail("PUT", "journal", "AccessDenied", times=50)
    with pytest.raises(StorageError):
        journal.flush()
    with pytest.raises(StorageError):
        journal.append(answer(SHARD.id, 1))


def test_redone_shards_replace_their_part(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("in.parquet", 5)], 5)
    assert commit(paths, "a1")
    plan = redo_shards(paths, [SHARD.id])
    (shard,) = pending_shards(paths, plan)
    assert shard.revision == 1
    assert race(4, lambda i: commit(paths, f"b{i}", shard)) != []
    assert part_info(paths, SHARD.id).revision == 1
    assert redone_shards(paths) == {SHARD.id: 1}
    assert list(pending_shards(paths, plan)) == []
    assert not commit(paths, "late", SHARD)
    assert not commit(paths, "late", shard)


def test_an_older_revision_that_wakes_late_loses(paths: RunPaths) -> None:
    """It looked at the part, slept, and meanwhile a later revision was put."""
    commit(paths, "a0")
    token = paths.storage.token(paths.part(SHARD.id))
    assert commit(paths, "a2", replace(SHARD, revision=2))
    old = paths.storage.make_private("old")
    old.write_bytes(b"old")
    assert not paths.storage.publish_replace(old, paths.part(SHARD.id), token)
    assert part_info(paths, SHARD.id).attempt == "a2"
    assert not commit(paths, "a1", replace(SHARD, revision=1))
    assert part_info(paths, SHARD.id).attempt == "a2"


def test_a_whole_job(paths: RunPaths, s3: S3) -> None:
    config = make_config(output={"path": paths.root})
    from jobs.fingerprint import fingerprint

    fp = fingerprint(config, "model")
    open_manifest(paths, config, fp)
    assert require_manifest(paths).fingerprint == fp.digest
    plan = grow_plan(paths, [File("a", 12), File("b", 3)], 5)
    queue = ShardQueue(paths, plan, Leases(paths, 100))
    num = 0
    while ticket := queue.take():
        s3.fail("PUT", "data/", "SlowDown")
        assert commit(paths, ticket.lease.attempt, ticket.shard)
        queue.done(ticket.shard.id)
        queue.leases.release(ticket.lease)
        num += 1
    assert (num, queue.num_left, queue.num_listings) == (4, 0, 2)
    queue.leases.close()
