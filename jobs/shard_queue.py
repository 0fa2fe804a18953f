"""Which shard this process tries next: planned, without a part, and held by nobody.

Lists the run folder when its picture of it has grown old, not for every shard, so that many
workers over many shards cost listings by the logarithm of the work. Knows nothing of how a shard
is worked on.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection
from typing import NamedTuple

from jobs.commit import is_committed, pending_numbers
from jobs.leases import Lease, Leases
from jobs.paths import RunPaths, shard_id, shard_number
from jobs.plan import Plan, Shard

log = logging.getLogger(__name__)
MAX_LOOKS = 16  # claims of others that one refresh looks at more closely
MIN_MISSES = 16  # shards that others had taken before the run folder is listed again


class Ticket(NamedTuple):
    """A shard that this process may work on, with its claim."""

    shard: Shard
    lease: Lease


class ShardQueue:
    """The shards that are left, as far as this process knows."""

    def __init__(
        self, paths: RunPaths, plan: Plan, leases: Leases, rng: random.Random | None = None
    ) -> None:
        self.paths = paths
        self.plan = plan
        self.leases = leases
        self.num_listings = 0
        self._rng = rng or random.Random()
        self._left: set[int] = set()  # numbers of shards without a part
        self._candidates: list[int] = []  # of these, the ones nobody seemed to hold; next is last
        self._num_misses = 0
        self._num_hits = 0

    @property
    def num_left(self) -> int:
        """Shards without a part at the last look, those that somebody works on among them."""
        return len(self._left)

    def take(self) -> Ticket | None:
        """Claim a shard; None when all that are left are held by others (or none are left).

        None with `num_left` above 0 means: ask again after a while, a holder may die.
        """
        looked = False
        while True:
            if not self._candidates or self._is_old():
                if looked:
                    return None
                self.refresh()
                looked = True
                if not self._candidates:
                    return None
            ticket = self._try(self._candidates.pop())
            if ticket is not None:
                return ticket

    def done(self, shard: str) -> None:
        """The shard is committed, by whomever."""
        self._left.discard(shard_number(shard))

    def put_back(self, shard: str) -> None:
        """Offer a shard again that this process gave up (its lease is released)."""
        self._candidates.insert(0, shard_number(shard))

    def refresh(self) -> None:
        """List the run folder: what is committed, and what is held."""
        self._left = pending_numbers(self.paths, self.plan)
        claims = self.leases.refresh()
        done = {shard for shard in claims if shard_number(shard) not in self._left}
        self.leases.sweep(done)
        claimed = claims.keys() - done
        busy = claimed | self.leases.held()
        free = self._left - {shard_number(shard) for shard in busy}
        self._candidates = sorted(free or self._abandoned(claimed), reverse=True)
        if claimed:
            # NOTE: others are at work; a random order keeps workers out of each other's way.
            self._rng.shuffle(self._candidates)
        self._num_misses = self._num_hits = 0
        self.num_listings += 1

    def _abandoned(self, claimed: Collection[str]) -> list[int]:
        """Claimed shards whose holders seem gone; looks at a few only, others look at others."""
        shards = self._rng.sample(sorted(claimed), min(MAX_LOOKS, len(claimed)))
        return [shard_number(shard) for shard in shards if self.leases.is_free(shard)]

    def _try(self, number: int) -> Ticket | None:
        shard = self.plan.shard(shard_id(number))
        lease = self.leases.acquire(shard.id)
        if lease is None:
            self._num_misses += 1
            return None
        if is_committed(self.paths, shard):
            self.leases.release(lease)
            self._left.discard(number)
            self._num_misses += 1
            return None
        self._num_hits += 1
        return Ticket(shard, lease)

    def _is_old(self) -> bool:
        return self._num_misses >= max(MIN_MISSES, self._num_hits)
