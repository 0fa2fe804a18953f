"""Clears what crashes left in a run folder of which every shard is committed.

Nothing here is needed for correctness: private files and journals of committed shards are never
read again.
"""

from __future__ import annotations

import logging

from jobs.commit import pending_shards
from jobs.leases import Leases
from jobs.paths import RunPaths
from jobs.plan import Plan
from jobs.storage import StorageError

log = logging.getLogger(__name__)


def tidy(paths: RunPaths, plan: Plan) -> int:
    """Delete leftovers of committed shards; returns how many."""
    pending = {shard.id for shard in pending_shards(paths, plan)}
    count = 0
    try:
        for shard in paths.storage.folders(paths.journals_folder):
            if shard not in pending:
                paths.storage.delete_folder(paths.journal_folder(shard))
                count += 1
        for name in paths.storage.names(paths.private_folder):
            if name.split(".", 1)[0] not in pending:
                paths.storage.delete(f"{paths.private_folder}/{name}")
                count += 1
        leases = Leases(paths)
        leases.sweep(leases.refresh().keys() - pending)
    except (OSError, StorageError) as error:
        log.warning("leftovers could not be cleared: %s", error)
    return count
