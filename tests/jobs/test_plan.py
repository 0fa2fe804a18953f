"""The plan: every row in exactly one shard, the same plan for everybody, growth, changed files."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import faults
from jobs.paths import RunPaths, part_shard, shard_id
from jobs.plan import Plan, grow_plan, load_plan, redo_shards
from jobs.storage import StorageError
from pipeline.errors import UserError
from tests.helpers.run_folder import File


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path))


def rows_of(plan: Plan) -> list[tuple[str, int]]:
    return [(shard.path, row) for shard in plan for row in range(shard.start, shard.stop)]


def check(plan: Plan, sizes: dict[str, int]) -> None:
    """Each row once; ids are dense, unique, and lead back to their shard."""
    rows = rows_of(plan)
    assert sorted(rows) == sorted((path, row) for path, n in sizes.items() for row in range(n))
    ids = [shard.id for shard in plan]
    assert ids == [shard_id(n) for n in range(plan.num_shards)] == list(plan.ids())
    assert all(plan.shard(shard.id) == shard for shard in plan)
    assert shard_id(plan.num_shards) not in plan
    assert "nonsense" not in plan
    assert plan.num_rows == len(rows)
    assert all(part_shard(f"data/{id_}.parquet") == id_ for id_ in ids)


SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 25), max_size=6)


@settings(max_examples=60, deadline=None)
@given(growth=st.lists(st.tuples(SIZES, st.integers(1, 9)), min_size=1, max_size=4))
def test_growth_keeps_every_shard(
    tmp_path_factory: pytest.TempPathFactory, growth: list[tuple[dict[str, int], int]]
) -> None:
    paths = RunPaths(str(tmp_path_factory.mktemp("run")))
    sizes: dict[str, int] = {}
    before: list[object] = []
    for added, rows_per_shard in growth:
        for path, num_rows in added.items():
            sizes[path] = max(num_rows, sizes.get(path, 0))
        files = [File(path, n) for path, n in sorted(sizes.items())]
        plan = grow_plan(paths, files, rows_per_shard)
        check(plan, sizes)
        assert list(plan)[: len(before)] == before
        assert all(s.num_rows <= rows_per_shard for s in list(plan)[len(before) :])
        before = list(plan)
        again = grow_plan(paths, files, rows_per_shard)
        assert (list(again), again.num_parts) == (before, plan.num_parts)


@settings(max_examples=60, deadline=None)
@given(old=SIZES, new=SIZES, rows_per_shard=st.integers(1, 9))
def test_changed_files_are_refused_or_redone(
    tmp_path_factory: pytest.TempPathFactory,
    old: dict[str, int],
    new: dict[str, int],
    rows_per_shard: int,
) -> None:
    paths = RunPaths(str(tmp_path_factory.mktemp("run")))
    first = grow_plan(paths, [File(p, n) for p, n in sorted(old.items())], rows_per_shard)
    files = [File(p, n, "changed") for p, n in sorted(new.items())]
    if any(old[path] for path in old.keys() & new.keys()):
        with pytest.raises(UserError, match="has changed .* --changed redo"):
            grow_plan(paths, files, rows_per_shard)
        assert load_plan(paths).num_parts == first.num_parts
    plan = grow_plan(paths, files, rows_per_shard, changed="redo")
    check(plan, {**old, **new})
    assert plan.missing(files) == sorted(old.keys() - new.keys())
    for shard in plan:
        if shard.id in first and shard.path in new:
            assert shard.revision == 1, shard
        if shard.path in new:
            assert shard.fingerprint == "changed"
    again = grow_plan(paths, files, rows_per_shard, changed="redo")
    assert again.num_parts == plan.num_parts


def test_limit_grows(paths: RunPaths) -> None:
    files = [File("a", 10), File("b", 10)]
    assert rows_of(grow_plan(paths, files, 4, limit=5)) == [("a", row) for row in range(5)]
    grown = grow_plan(paths, files, 4, limit=13)
    assert [(s.path, s.start, s.stop) for s in grown] == [
        ("a", 0, 4), ("a", 4, 5), ("a", 5, 9), ("a", 9, 10), ("b", 0, 3),
    ]  # fmt: skip
    check(grow_plan(paths, files, 4), {"a": 10, "b": 10})
    assert len(rows_of(grow_plan(paths, files, 4, limit=1))) == 20


def test_grown_files_give_new_shards_only(paths: RunPaths) -> None:
    def still_holds(path: str, fingerprint: str) -> bool:
        return (path, fingerprint) == ("a", "f0")

    before = list(grow_plan(paths, [File("a", 7), File("b", 3)], 3))
    grown = [File("a", 12, "f1"), File("b", 3)]
    with pytest.raises(UserError, match="has changed"):
        grow_plan(paths, grown, 3)
    plan = grow_plan(paths, grown, 3, still_holds=still_holds)
    check(plan, {"a": 12, "b": 3})
    assert list(plan)[: len(before)] == before
    assert {s.fingerprint for s in list(plan)[len(before) :]} == {"f1"}
    assert plan.changed(grown) == []
    assert grow_plan(paths, grown, 3).num_parts == plan.num_parts
    with pytest.raises(UserError, match="has changed"):
        grow_plan(paths, [File("a", 12, "f2"), File("b", 3)], 3, still_holds=still_holds)


def test_moved_files_are_the_same_files(paths: RunPaths) -> None:
    """Another spelling of the same path, a moved folder: nothing is doubled."""
    old = [File("data/a", 7, "fa"), File("data/b", 5, "fb"), File("data/c", 5, "fb")]
    before = grow_plan(paths, old, 3)
    new = [File(f"/abs/{f.path}", f.num_rows, f.fingerprint) for f in old]
    plan = grow_plan(paths, [*new, File("/abs/data/d", 2, "fd")], 3)
    check(plan, {"/abs/data/a": 7, "/abs/data/b": 5, "/abs/data/c": 5, "/abs/data/d": 2})
    moved = [(s.id, s.start, s.stop, f"/abs/{s.path}") for s in before]
    assert [(s.id, s.start, s.stop, s.path) for s in plan][: len(moved)] == moved
    assert plan.is_same_file("data/a", "/abs/data/a")
    assert not plan.is_same_file("data/a", "/abs/data/b")
    back = grow_plan(paths, [*old, File("/abs/data/d", 2, "fd")], 3)
    check(back, {"data/a": 7, "data/b": 5, "data/c": 5, "/abs/data/d": 2})
    assert back.is_same_file("data/a", "data/a")
    assert back.is_same_file("/abs/data/a", "data/a")
    copies = [*old, File("/abs/data/d", 2, "fd"), File("data/copy", 7, "fa")]
    check(grow_plan(paths, copies, 3), {**{f.path: f.num_rows for f in copies}})


def test_many_plan_at_once(paths: RunPaths) -> None:
    files = [File(f"f{i}", 7) for i in range(20)]
    plans: list[Plan] = []
    barrier = threading.Barrier(8)

    def run(number: int) -> None:
        barrier.wait()
        plans.append(grow_plan(paths, files[: 13 + number], 3))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 8
    check(load_plan(paths), {f.path: 7 for f in files})


def test_single_shards_are_redone(paths: RunPaths) -> None:
    grow_plan(paths, [File("a", 10)], 3)
    plan = redo_shards(paths, [shard_id(1), shard_id(3)])
    assert [s.revision for s in plan] == [0, 1, 0, 1]
    plan = redo_shards(paths, [shard_id(1)])
    assert [s.revision for s in plan] == [0, 2, 0, 1]
    assert redo_shards(paths, []).num_parts == plan.num_parts
    changed = grow_plan(paths, [File("a", 10, "new")], 3, changed="redo")
    assert [s.revision for s in changed] == [3, 3, 3, 3]
    check(changed, {"a": 10})


def test_a_damaged_part_is_told(paths: RunPaths) -> None:
    grow_plan(paths, [File("a", 10)], 3)
    part = paths.local(paths.plan_part(0))
    assert part is not None
    whole = part.read_bytes()
    for at in range(0, len(whole) - 1, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        part.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_plan(paths)
    for cut in (0, 10, len(whole) // 2):
        part.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="is damaged"):
            load_plan(paths)


def test_a_lost_part_is_told(paths: RunPaths) -> None:
    grow_plan(paths, [File("a", 10)], 3)
    grow_plan(paths, [File("a", 10), File("b", 10)], 3)
    paths.storage.delete(paths.plan_part(0))
    with pytest.raises(UserError, match="has lost a part"):
        load_plan(paths)


def test_an_endless_race_ends(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.plan.write_part", lambda *_: False)
    with pytest.raises(StorageError, match="grew 100 times"):
        grow_plan(paths, [File("a", 1)], 1)


def test_a_full_disk_leaves_the_plan_as_it_was(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow_plan(paths, [File("a", 10)], 3)
    monkeypatch.setenv(faults.ENV, "storage.write:enospc:1+")
    faults.reset()
    with pytest.raises(StorageError):
        grow_plan(paths, [File("a", 10), File("b", 1)], 3)
    monkeypatch.delenv(faults.ENV)
    check(load_plan(paths), {"a": 10})


def test_memory_goes_by_files_not_rows(paths: RunPaths) -> None:
    grow_plan(paths, [File(f"f{i}", 100_000_000) for i in range(10)], 4096)
    tracemalloc.start()
    plan = load_plan(paths)
    assert plan.num_rows == 1_000_000_000
    assert plan.shard(shard_id(plan.num_shards - 1)).stop == 100_000_000
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
