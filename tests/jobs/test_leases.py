"""Leases: one holder, takeover of the silent and the dead, and never by the wall clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.leases import Leases, is_dead, machine_id, new_attempt_id, process_start
from jobs.paths import RunPaths

SHARD = "shard-00000001"
TTL = 100.0


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders seem to be on another machine, so that only their silence tells."""
    monkeypatch.setattr("jobs.leases.machine_id", lambda: os.urandom(4).hex())


def test_one_holder_at_a_time(paths: RunPaths, clock: Clock) -> None:
    first, second = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    lease = first.acquire(SHARD)
    assert lease is not None
    assert first.acquire(SHARD) is None
    assert second.acquire(SHARD) is None
    first.release(lease)
    second.refresh()
    assert second.acquire(SHARD) is not None
    second.close()
    assert paths.storage.names(paths.lease_folder) == []


def test_many_ask_at_once(paths: RunPaths) -> None:
    everyone = [Leases(paths, TTL) for _ in range(8)]
    got: list[object] = []
    threads = [
        threading.Thread(target=lambda leases=leases: got.append(leases.acquire(SHARD)))
        for leases in everyone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lease for lease in got if lease is not None]) == 1


@pytest.mark.usefixtures("elsewhere")
def test_a_silent_holder_is_replaced_after_the_ttl(paths: RunPaths, clock: Clock) -> None:
    first, second = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    lost = first.acquire(SHARD)
    assert lost is not None
    second.refresh()
    clock.now += TTL - 1
    assert second.acquire(SHARD) is None
    assert not second.is_free(SHARD)
    clock.now += 2
    assert second.is_free(SHARD)
    taken = second.acquire(SHARD)
    assert taken is not None
    assert taken.turn == 1
    first.beat()
    assert lost.lost
    assert not taken.lost
    first.release(lost)
    assert second.held() == {SHARD}
    third = Leases(paths, TTL, clock)
    third.refresh()
    assert third.acquire(SHARD) is None
    second.close()
    assert paths.storage.names(paths.lease_folder) == []


@pytest.mark.usefixtures("elsewhere")
def test_a_beating_holder_is_never_replaced(paths: RunPaths, clock: Clock) -> None:
    first, second = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    first.acquire(SHARD)
    for _ in range(10):
        second.refresh()
        clock.now += TTL + 1
        first.beat()
        assert second.acquire(SHARD) is None  # its last look is old, so it looks once more
    first.close()


@pytest.mark.usefixtures("elsewhere")
def test_a_listing_after_long_sleep_restarts_the_wait(paths: RunPaths, clock: Clock) -> None:
    first, second = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    first.acquire(SHARD)
    second.refresh()
    first.beat()
    clock.now += 10 * TTL  # this process slept; the holder did not
    second.refresh()
    assert second.acquire(SHARD) is None


@pytest.mark.usefixtures("elsewhere")
def test_two_that_take_over_at_once(paths: RunPaths, clock: Clock) -> None:
    holder, *others = [Leases(paths, TTL, clock) for _ in range(5)]
    holder.acquire(SHARD)
    for leases in others:
        leases.refresh()
    clock.now += TTL + 1
    got = [leases.acquire(SHARD) for leases in others]
    assert len([lease for lease in got if lease is not None]) == 1


@pytest.mark.usefixtures("elsewhere")
def test_the_wall_clock_does_not_matter(
    paths: RunPaths, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    first.acquire(SHARD)
    second.refresh()
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: time.monotonic() + jump)
        claim = paths.local(paths.lease(SHARD, 0))
        assert claim is not None
        second.refresh()
        assert second.acquire(SHARD) is None


@pytest.mark.usefixtures("elsewhere")
def test_a_claim_that_is_garbage_becomes_stale(paths: RunPaths, clock: Clock) -> None:
    paths.storage.write_exclusive(paths.lease(SHARD, 4), b"\xff{")
    leases = Leases(paths, TTL, clock)
    leases.refresh()
    assert leases.acquire(SHARD) is None
    clock.now += TTL + 1
    lease = leases.acquire(SHARD)
    assert lease is not None
    assert lease.turn == 5


def test_a_dead_process_on_this_machine_is_replaced_at_once(paths: RunPaths) -> None:
    code = (
        "from jobs.leases import Leases; from jobs.paths import RunPaths; import os, sys\n"
        f"assert Leases(RunPaths(sys.argv[1])).acquire({SHARD!r})\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, paths.root], check=False)
    assert done.returncode == -9
    leases = Leases(paths, TTL)
    leases.refresh()
    lease = leases.acquire(SHARD)
    assert lease is not None
    leases.close()
    assert paths.storage.names(paths.lease_folder) == []


def test_a_name_that_is_claimed_anew_is_not_the_dead_holders(paths: RunPaths, clock: Clock) -> None:
    first, second, looker = (Leases(paths, TTL, clock) for _ in range(3))
    lease = first.acquire(SHARD)
    assert lease is not None
    looker.refresh()
    assert looker.acquire(SHARD) is None  # it has read who holds the shard
    first.release(lease)
    assert second.acquire(SHARD) is not None
    looker.refresh()
    known = paths.storage.read(paths.lease(SHARD, 0))
    dead = json.loads(known)
    looker._claims[SHARD].holder = {**dead, "attempt": lease.attempt, "process_start": "1"}
    assert looker.acquire(SHARD) is None


def test_who_is_dead() -> None:
    me = {"machine": machine_id(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
    assert not is_dead(me)
    assert is_dead({**me, "process_start": "1"})
    assert is_dead({**me, "pid": 2**22 + 1})
    assert not is_dead({**me, "machine": "another", "pid": 2**22 + 1})
    assert not is_dead({})


def test_the_thread_renews(paths: RunPaths) -> None:
    leases = Leases(paths, ttl_sec=0.3)
    lease = leases.acquire(SHARD)
    assert lease is not None
    before = paths.storage.token(lease.name)
    deadline = time.monotonic() + 10
    while paths.storage.token(lease.name) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    content = json.loads(paths.storage.read(lease.name))
    assert content["attempt"] == lease.attempt
    leases.close()
    time.sleep(0.2)
    assert paths.storage.names(paths.lease_folder) == []


@pytest.mark.usefixtures("elsewhere")
def test_sweep_deletes_stale_claims_only(paths: RunPaths, clock: Clock) -> None:
    holder, leases = Leases(paths, TTL, clock), Leases(paths, TTL, clock)
    holder.acquire(SHARD)
    leases.refresh()
    leases.sweep([SHARD])
    assert len(paths.storage.names(paths.lease_folder)) == 1
    clock.now += TTL + 1
    leases.sweep([SHARD])
    assert paths.storage.names(paths.lease_folder) == []


def test_attempt_ids_differ_and_are_names() -> None:
    names = {new_attempt_id() for _ in range(100)}
    assert len(names) == 100
    assert not any(set(name) & set("./ ") for name in names)
