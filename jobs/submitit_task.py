"""A run as a callable for submitit, whose users launch Python functions.

    executor.map_array(RunTask("job.yaml"), range(8))

submitit pickles the task, runs it on a node, and calls `checkpoint` at a preemption or near the
time limit; the task then goes on in a new job. Knows submitit only inside `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RunTask:
    """Runs the job of a config; tasks of one array share the shards. Returns the exit code."""

    def __init__(self, config: str, sets: Sequence[str] = ()) -> None:
        self.config = config
        self.sets = tuple(sets)

    def __call__(self, *number: Any) -> int:
        """`number` is the array's index, which no task needs."""
        from jobs.config import load_config
        from jobs.runner import Options, run_job

        return run_job(load_config(self.config, self.sets), Options()).code

    def checkpoint(self, *number: Any) -> Any:
        """What submitit submits anew: the same task; the run folder holds all that was done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *number)
