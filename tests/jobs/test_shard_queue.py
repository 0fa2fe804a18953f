"""The queue of shards: all of them, once, by any number of workers, with few listings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jobs.commit import commit_shard
from jobs.leases import Leases
from jobs.paths import RunPaths
from jobs.plan import Plan, grow_plan, redo_shards
from jobs.shard_queue import ShardQueue, Ticket
from tests.helpers.run_folder import File, shard_table


def finish(paths: RunPaths, queue: ShardQueue, ticket: Ticket) -> None:
    shard, lease = ticket
    table = shard_table(shard)
    assert commit_shard(paths, shard, table, attempt=lease.attempt, fingerprint="fp")
    queue.done(shard.id)
    queue.leases.release(lease)


def worker(paths: RunPaths, plan: Plan, seed: int) -> ShardQueue:
    return ShardQueue(paths, plan, Leases(paths, 100), random.Random(seed))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path))


def test_one_worker_goes_in_order(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("a", 20)], 2)
    queue, taken = worker(paths, plan, 0), []
    while ticket := queue.take():
        taken.append(ticket.shard)
        finish(paths, queue, ticket)
    assert taken == list(plan)
    assert queue.num_left == 0
    assert queue.num_listings == 2


def test_many_workers_share(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("a", 120)], 1)
    workers = [worker(paths, plan, seed) for seed in range(6)]
    taken: list[str] = []
    rng = random.Random(0)
    open_: list[tuple[ShardQueue, Ticket]] = []
    while len(taken) < len(plan):
        queue = rng.choice(workers)
        if (ticket := queue.take()) is not None:
            taken.append(ticket.shard.id)
            open_.append((queue, ticket))
        while len(open_) > 8 or (open_ and ticket is None):
            finish(paths, *open_.pop(rng.randrange(len(open_))))
    assert sorted(taken) == sorted(plan.ids())
    assert max(queue.num_listings for queue in workers) < 25


def test_what_others_hold_is_left_to_them(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("a", 2)], 1)
    first, second = worker(paths, plan, 0), worker(paths, plan, 1)
    one, two = first.take(), second.take()
    assert one is not None
    assert two is not None
    assert first.take() is None
    assert first.num_left == 2
    second.leases.release(two.lease)
    second.put_back(two.shard.id)
    taken = first.take()
    assert taken is not None
    assert taken.shard == two.shard
    assert second.take() is None
    finish(paths, first, taken)
    finish(paths, first, one)
    assert second.take() is None
    assert second.num_left == 0


def test_redone_shards_come_again(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("a", 3)], 1)
    queue = worker(paths, plan, 0)
    while ticket := queue.take():
        finish(paths, queue, ticket)
    plan = redo_shards(paths, ["shard-00000001"])
    queue = worker(paths, plan, 0)
    ticket = queue.take()
    assert ticket is not None
    assert (ticket.shard.id, ticket.shard.revision) == ("shard-00000001", 1)
    finish(paths, queue, ticket)
    assert queue.take() is None
    assert queue.num_left == 0


def test_claims_left_on_finished_shards_are_swept(paths: RunPaths) -> None:
    plan = grow_plan(paths, [File("a", 1)], 1)
    queue = worker(paths, plan, 0)
    ticket = queue.take()
    assert ticket is not None
    finish(paths, queue, ticket)
    ghost = {"attempt": "x", "machine": "here", "pid": 1, "process_start": "0"}
    claim = str(ghost).replace("'", '"').encode()
    paths.storage.write_exclusive(paths.lease("shard-00000000", 0), claim)
    later = worker(paths, plan, 0)
    later.leases._clock = lambda: 0.0
    assert later.take() is None
    later.leases._clock = lambda: 101.0
    assert later.take() is None
    assert paths.storage.names(paths.lease_folder) == []
