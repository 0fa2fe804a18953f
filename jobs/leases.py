"""Leases: which worker is at which shard now, so that no work is done twice without need.

A lease is a claim file, made exclusively and renewed by a thread. Whoever finds that it has not
changed for `ttl_sec` of its own clock, or that its holder's process on this machine is gone, takes
the next turn. Correctness never rests on a lease: a commit is exclusive by itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.faults import fault
from jobs.paths import RunPaths
from jobs.storage import StorageError

log = logging.getLogger(__name__)
BEATS_PER_TTL = 6
_NAME = re.compile(r"(?P<shard>[^.]+)\.(?P<turn>\d+)\.json")


@dataclass
class Lease:
    """A claim on one shard. `lost` turns true when somebody else has taken the shard over."""

    shard: str
    attempt: str
    turn: int
    name: str
    lost: bool = False
    released: bool = False
    num_beats: int = 0
    superseded: tuple[str, ...] = ()  # older claims of this shard, newest first


@dataclass
class Claim:
    """Another worker's claim as the last listing showed it."""

    shard: str
    turn: int
    name: str
    token: str
    seen_at: float  # this process's clock when the token was first seen
    holder: dict[str, Any] | None = None  # what the file says, once somebody asks


class Leases:
    """All leases of this process, renewed by one thread. Thread-safe."""

    def __init__(
        self, paths: RunPaths, ttl_sec: float = 120.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.paths = paths
        self.ttl_sec = ttl_sec
        self._clock = clock
        self._held: dict[str, Lease] = {}
        self._claims: dict[str, Claim] = {}  # by shard
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, shard: str) -> Lease | None:
        """Claim a shard that nobody holds, or whose holder gives no sign; None when it is held."""
        with self._lock:
            if shard in self._held:
                return None
            claim = self._claims.get(shard)
            if claim is not None and not self._is_stale(claim):
                return None
            turn = claim.turn + 1 if claim is not None else 0
            lease = self._create(shard, turn)
            if lease is None:
                self._look_at(shard, turn)
                return None
            if claim is not None:
                holder = claim.holder or {}
                log.warning("%s: taken over from %s", shard, holder.get("attempt", "a worker"))
                # NOTE: the older claims stay until the release: they hold the earlier turns.
                lease.superseded = tuple(self.paths.lease(shard, t) for t in reversed(range(turn)))
                del self._claims[shard]
            self._held[shard] = lease
            self._start_thread()
            return lease

    def release(self, lease: Lease) -> None:
        """Give a shard back; a failure to do so costs others the lease's time, nothing else."""
        with self._lock:
            if lease.released:
                return
            lease.released = True
            self._held.pop(lease.shard, None)
        fault("lease.before_release")
        try:
            for name in (lease.name, *lease.superseded):
                self.paths.storage.delete(name)
        except (OSError, StorageError) as error:
            log.warning("%s: its lease could not be deleted: %s", lease.shard, error)

    def refresh(self) -> dict[str, Claim]:
        """List the claims of others: one listing."""
        now = self._clock()
        entries = self.paths.storage.entries(self.paths.lease_folder)
        newest: dict[str, tuple[int, str, str]] = {}
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is not None:
                turn = int(match["turn"])
                if match["shard"] not in newest or turn > newest[match["shard"]][0]:
                    newest[match["shard"]] = (turn, entry.name, entry.token)
        with self._lock:
            claims = {}
            for shard, (turn, name, token) in newest.items():
                if shard not in self._held:
                    name = f"{self.paths.lease_folder}/{name}"
                    claims[shard] = self._update(shard, turn, name, token, now)
            self._claims = claims
            return dict(claims)

    def sweep(self, shards: Collection[str]) -> None:
        """Delete claims that dead workers left on shards that need no more work."""
        with self._lock:
            for shard in list(self._claims):
                if shard in shards and self._is_stale(self._claims[shard]):
                    claim = self._claims.pop(shard)
                    for turn in reversed(range(claim.turn + 1)):
                        self.paths.storage.delete(self.paths.lease(shard, turn))

    def is_free(self, shard: str) -> bool:
        """Whether nobody seems to hold a shard, or its holder gives no sign."""
        with self._lock:
            claim = self._claims.get(shard)
            return claim is None or self._is_stale(claim)

    def held(self) -> set[str]:
        """Shards that this process holds."""
        with self._lock:
            return set(self._held)

    def close(self) -> None:
        """Release all that is held."""
        self._closed.set()
        for lease in list(self._held.values()):
            self.release(lease)
        if self._thread is not None:
            self._thread.join()

    def _create(self, shard: str, turn: int) -> Lease | None:
        attempt = new_attempt_id()
        lease = Lease(shard, attempt, turn, self.paths.lease(shard, turn))
        fault("lease.before_acquire")
        if not self.paths.storage.write_exclusive(lease.name, _content(lease)):
            return None
        fault("lease.after_acquire")
        return lease

    def _look_at(self, shard: str, turn: int) -> None:
        """Remember a claim that stood in the way."""
        name = self.paths.lease(shard, turn)
        token = self.paths.storage.token(name)
        if token is not None:
            self._claims[shard] = self._update(shard, turn, name, token, self._clock())

    def _update(self, shard: str, turn: int, name: str, token: str, now: float) -> Claim:
        known = self._claims.get(shard)
        if known is not None and (known.name, known.token) == (name, token):
            return known
        holder = known.holder if known is not None and known.name == name else None
        return Claim(shard, turn, name, token, now, holder)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.paths.storage.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _is_stale(self, claim: Claim) -> bool:
        """Whether a claim may be taken over; asks the storage once more before saying so."""
        if self._holder_is_dead(claim):
            return True
        if self._clock() - claim.seen_at < self.ttl_sec:
            return False
        token = self.paths.storage.token(claim.name)
        if token == claim.token:
            return True
        if token is None:
            del self._claims[claim.shard]
            return False
        claim.token, claim.seen_at = token, self._clock()
        return False

    def _holder_is_dead(self, claim: Claim) -> bool:
        if claim.holder is None:
            claim.holder = self._read(claim.name)
        if not is_dead(claim.holder):
            return False
        # NOTE: the shard may have been released and claimed anew under the same name.
        claim.holder = self._read(claim.name)
        return is_dead(claim.holder)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)
            self._thread.start()

    def _keep_alive(self) -> None:
        while not self._closed.wait(self.ttl_sec / BEATS_PER_TTL):
            self.beat()

    def beat(self) -> None:
        """Renew all leases, and notice those that are lost."""
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            try:
                self._beat(lease)
            except (OSError, StorageError) as error:
                log.warning("%s: its lease could not be renewed: %s", lease.shard, error)

    def _beat(self, lease: Lease) -> None:
        fault("lease.heartbeat")
        if self.paths.storage.exists(self.paths.lease(lease.shard, lease.turn + 1)):
            lease.lost = True
        with self._lock:
            if lease.released:
                return
            lease.num_beats += 1
            # NOTE: under the lock, so that a release cannot come between and leave a ghost.
            self.paths.storage.replace(lease.name, _content(lease))


def new_attempt_id() -> str:
    """A name that no other attempt has; begins with the time, for people only."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:24]
    return f"{stamp}-{host}-{os.getpid()}-{os.urandom(3).hex()}"


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether a claim's process ran on this machine and is certainly gone."""
    machine = holder.get("machine")
    if not machine or machine != machine_id():
        return False
    return process_start(int(holder.get("pid", 0))) != holder.get("process_start")


def machine_id() -> str:
    """Names this boot of this machine and this process namespace; empty where neither is told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def slurm_task() -> str | None:
    """The SLURM job that this process runs in, an array's task as `123_4`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _content(lease: Lease) -> bytes:
    content = {
        "attempt": lease.attempt,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": machine_id(),
        "process_start": process_start(os.getpid()),
        "slurm_job": slurm_task(),
        "beats": lease.num_beats,
    }
    return json.dumps(content).encode()
