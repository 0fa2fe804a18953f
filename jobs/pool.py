"""Worker processes of one host: starts one a device, adds up what they report, restarts the dead.

A worker gets its config on stdin and stops when stdin closes, so that none outlives its runner;
it reports JSON lines on a pipe. Knows processes; shards are the workers' business.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.progress import Counts, Progress
from jobs.signals import EXIT_STOPPED, GRACE_SEC, StopRequest

RESTART_WAIT_SEC = 0.3
RUNNER_GRACE_SEC = 1.5
START_SEC = 30.0  # that a worker may take longer until its first word
FINAL_CODES = (0, 1, 2, EXIT_STOPPED)  # a worker that ended by itself; all else is a death


@dataclass
class Member:
    """One worker process and its successors."""

    number: int
    env: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0  # in a row, of processes that made no progress
    progressed: bool = False  # this process
    code: int | None = None
    heard_at: float = 0.0  # of the last progress
    result: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class WorkerPool:
    """Runs `len(environments)` workers until each has ended for good."""

    def __init__(
        self,
        config: str,
        environments: Sequence[Mapping[str, str]],
        stop: StopRequest,
        progress: Progress,
        *,
        attempts: int,
        watchdog_sec: float,
        on_death: Callable[[int], object] = lambda pid: None,
    ) -> None:
        self.config = config
        self.stop = stop
        self.progress = progress
        self.attempts = attempts
        self.watchdog_sec = watchdog_sec
        self.on_death = on_death
        self.members = [Member(i, env) for i, env in enumerate(environments)]

    def run(self) -> list[Member]:
        """Block until all workers have ended; their `code` and `result` are set."""
        threads = [
            threading.Thread(target=self._supervise, args=(member,), name=f"worker-{member.number}")
            for member in self.members
        ]
        self.stop.on_request(self.ask_to_stop)
        self.stop.before_hard_exit(self.kill)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.members

    def ask_to_stop(self) -> None:
        for member in self.members:
            self._ask(member)

    def _ask(self, member: Member) -> None:
        """A worker's grace time ends before its runner's, which would kill it."""
        grace = f"{max(1.0, self.stop.grace_sec - RUNNER_GRACE_SEC)}".encode()
        with member.lock, contextlib.suppress(OSError, ValueError):
            if member.process is not None and member.process.stdin is not None:
                member.process.stdin.write(grace)
                member.process.stdin.close()

    def kill(self) -> None:
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                member.process.kill()

    def _supervise(self, member: Member) -> None:
        while True:
            code = self._live(member)
            if code in FINAL_CODES:
                member.code = code
                return
            if member.process is not None:
                self.on_death(member.process.pid)
            member.deaths = 0 if member.progressed else member.deaths + 1
            self.progress.note(
                f"worker {member.number} died ({_describe(code)}), "
                f"{member.deaths} times without progress, of {self.attempts} allowed"
            )
            if self.stop or member.deaths >= self.attempts:
                member.code = EXIT_STOPPED if self.stop else 1
                return
            self.stop.wait(RESTART_WAIT_SEC * 4 ** max(0, member.deaths - 1))

    def _live(self, member: Member) -> int:
        """One process from start to end; returns its exit status."""
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.worker_process", str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(writer,),
            env={**os.environ, **member.env},
            start_new_session=True,
        )
        os.close(writer)
        with member.lock:
            member.process = process
        member.heard_at = time.monotonic() + START_SEC
        member.progressed = False
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.config.encode() + b"\n")
            process.stdin.flush()
        if self.stop:
            self._ask(member)
        watchdog = self._start_watchdog(member, process)
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                self._heard(member, line)
        code = process.wait()
        watchdog.set()
        _close_stdin(member)
        return code

    def _heard(self, member: Member, line: str) -> None:
        told = json.loads(line)
        member.heard_at = time.monotonic()
        if "counts" in told or "alive" in told:
            member.progressed = True
        if "counts" in told:
            self.progress.add(Counts(**told["counts"]))
        if "stage" in told:
            self.progress.stage(told["stage"])
        if "note" in told:
            self.progress.note(f"worker {member.number}: {told['note']}")
        if "found" in told:
            self.progress.found(told["found"])
        if "result" in told:
            member.result = told["result"]

    def _start_watchdog(self, member: Member, process: subprocess.Popen[bytes]) -> threading.Event:
        ended = threading.Event()
        watched = (member, process, self.watchdog_sec, ended, self.progress.note)
        threading.Thread(target=_watch, args=watched, daemon=True).start()
        return ended


def _watch(
    member: Member,
    process: subprocess.Popen[bytes],
    limit_sec: float,
    ended: threading.Event,
    note: Callable[[str], None],
) -> None:
    while not ended.wait(min(limit_sec / 4, 5.0)):
        if time.monotonic() - member.heard_at > limit_sec:
            note(f"worker {member.number} made no progress for {limit_sec:g} s: killed")
            process.kill()
            return


def _close_stdin(member: Member) -> None:
    with member.lock, contextlib.suppress(OSError):
        if member.process is not None and member.process.stdin is not None:
            member.process.stdin.close()


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def visible_devices() -> list[str]:
    """CUDA devices that this process may use, by name; empty without a GPU. Loads no torch."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        names = [name.strip() for name in told.split(",")]
        return [name for name in names if name and name != "-1"]
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=GRACE_SEC,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.split()


def environments(workers: int, device: str) -> list[dict[str, str]]:
    """What tells each of `workers` processes its device: one device each, round robin."""
    devices = visible_devices() if device in ("auto", "cuda") else []
    if not devices:
        return [{} for _ in range(workers)]
    return [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(workers)]
