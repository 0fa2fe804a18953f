"""Labels a shard that workers have died of, portion by portion, so that the next death tells more.

Before a worker tries rows that another has died of, it answers a row from elsewhere: a device that
cannot do that is at fault, and no row. Knows isolation's rules; not how rows are labelled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from jobs.isolation import CRASHED, Portion, Suspicion
from jobs.job import Job
from jobs.open_shard import OpenShard
from pipeline.errors import RowError
from pipeline.rows import Answer, RequestKey, ShardWork

PROOF = "proof"  # a shard of no plan: answers to it are thrown away
NUM_PROOFS = 3  # rows that may fail by themselves before a worker counts as unable


@dataclass(frozen=True)
class Hands:
    """What the worker lends."""

    job: Job
    label: Callable[[ShardWork], None]
    take: Callable[[Answer], None]
    goes_on: Callable[[OpenShard], bool]  # false: stopped, or the shard was lost or given back
    has_proved: Callable[[], bool]  # whether this process has answered any row well
    narrowed: Callable[[OpenShard], None]  # a death from here on is progress


def label_in_portions(hands: Hands, shard: OpenShard) -> None:
    """Label what is left of a suspected shard."""
    assert shard.suspicion is not None
    for row in shard.suspicion.crashed:
        for prompt in hands.job.config.prompt_names():
            hands.take(Answer.failed(RequestKey(shard.id, row, prompt), RowError(CRASHED)))
    for portion in shard.suspicion.portions:
        if shard.suspicion.is_dubious(portion):
            _prove(hands, shard, shard.suspicion)
        if not hands.goes_on(shard):
            return
        _try(hands, shard, portion)


def _try(hands: Hands, shard: OpenShard, portion: Portion) -> None:
    proved = hands.has_proved()
    shard.journal.note(trying=portion, proved=proved)
    shard.journal.flush()
    if proved:
        hands.narrowed(shard)
    hands.label(shard.work(portion))
    if hands.goes_on(shard) and set(portion).isdisjoint(shard.attempt.rows_left()):
        shard.journal.note(tried=portion)


def _prove(hands: Hands, shard: OpenShard, suspicion: Suspicion) -> None:
    for _ in range(NUM_PROOFS):
        if hands.has_proved() or not hands.goes_on(shard):
            return
        work = _other_row(hands.job, shard, suspicion)
        if work is not None:
            hands.label(work)


def _other_row(job: Job, shard: OpenShard, suspicion: Suspicion) -> ShardWork | None:
    """A row of this shard that nobody has died of, or else one of another shard."""
    ours, suspects = shard.ticket.shard, suspicion.suspects()
    if own := [row for row in range(ours.num_rows) if row not in suspects]:
        path, start = ours.path, ours.start + random.choice(own)
    else:
        other = job.plan.shard(random.choice(list(job.plan.ids())))
        if other.id == ours.id or not other.num_rows:
            return None
        path, start = other.path, random.randrange(other.start, other.stop)
    return ShardWork(PROOF, job.source.read(path, start, start + 1))
