"""A runner's word that a worker of its own has died: `<attempt>.died` beside the journal.

Whatever takes the runner down as well (a lost node, a preemption) leaves no such word, so it is no
evidence against the rows that were at work. Knows leases and journals by their names.
"""

from __future__ import annotations

import json
import logging

from jobs.leases import machine_id
from jobs.paths import RunPaths
from jobs.storage import StorageError

log = logging.getLogger(__name__)


def witness_death(paths: RunPaths, pid: int) -> list[str]:
    """Note the attempts of a dead process of this machine; best effort. Returns them."""
    attempts = []
    try:
        for name in paths.storage.names(paths.lease_folder):
            holder = _read(paths, f"{paths.lease_folder}/{name}")
            if holder.get("pid") == pid and holder.get("machine") == machine_id() != "":
                attempt = str(holder["attempt"])
                paths.storage.write_exclusive(paths.death(name.split(".", 1)[0], attempt), b"")
                attempts.append(attempt)
    except (OSError, StorageError) as error:
        log.warning("the death of process %d could not be noted: %s", pid, error)
    return attempts


def _read(paths: RunPaths, name: str) -> dict[str, object]:
    try:
        holder = json.loads(paths.storage.read(name))
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
