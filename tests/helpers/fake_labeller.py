"""A deterministic labeller with the real interface, for crash and command tests: no torch.

An answer depends on the row's id, the prompt and the seed alone. Select it with
`VLM_BATCH_LABELLER=tests/helpers/fake_labeller.py:FakeLabeller`; the environment steers it:

    FAKE_DELAY_SEC    seconds an answer takes
    FAKE_IN_FLIGHT    answers that are under way at once (default 8); they come back shuffled
    FAKE_LOG          file that gets one line for each answer generated
    FAKE_DEVICE_LOG   file that gets one line for each labeller: its process and its GPUs
    FAKE_KILL_AT      kill -9 the own process at this many answers
    FAKE_KILL_ROWS    kill -9 the own process whenever one of these row ids is met
    FAKE_HANG_ROWS    never answer these row ids
    FAKE_EAT_ROWS     take 4 GiB of memory at these row ids
    FAKE_ERROR_AT     raise EngineError once, at this many answers
    FAKE_ERROR_ALWAYS raise EngineError at the first answer of every labeller
    FAKE_FAIL_ROWS    comma-separated row ids that end as failed with `corrupt_image`
    FAKE_HANG         take a drain request and ignore it
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import EngineError, RowError
from pipeline.rows import Answer, RequestKey, Row, ShardWork
from pipeline.settings import LabelSettings


class FakeLabeller:
    """Answers `<prompt name> of <row id>: <hash>`."""

    errors_raised = 0

    def __init__(self, settings: LabelSettings) -> None:
        self.settings = settings
        self.prompts = (
            {"answer": ""}
            if settings.input.messages
            else {name: prompt.text for name, prompt in settings.prompts.items()}
        )
        self.delay_sec = float(os.environ.get("FAKE_DELAY_SEC", "0"))
        self.in_flight = int(os.environ.get("FAKE_IN_FLIGHT", "8"))
        self.fail_rows = _names("FAKE_FAIL_ROWS")
        self.kill_rows = _names("FAKE_KILL_ROWS")
        self.hang_rows = _names("FAKE_HANG_ROWS")
        self.eat_rows = _names("FAKE_EAT_ROWS")
        self.kill_at = int(os.environ.get("FAKE_KILL_AT", "0"))
        self.error_at = int(os.environ.get("FAKE_ERROR_AT", "0"))
        self.hang = "FAKE_HANG" in os.environ
        if path := os.environ.get("FAKE_DEVICE_LOG"):
            with open(path, "a") as file:
                told = (os.environ.get(n, "-") for n in ("CUDA_VISIBLE_DEVICES", "SLURM_PROCID"))
                file.write(f"{os.getpid()} {' '.join(told)}\n")
        self.num_answers = 0
        self.draining = False
        self._log = open(path, "ab", buffering=0) if (path := os.environ.get("FAKE_LOG")) else None

    def label(self, shards: Iterable[ShardWork]) -> Iterator[Answer]:
        waiting: list[tuple[RequestKey, Row]] = []
        shuffler = random.Random(7)
        for key, row in self._requests(shards):
            waiting.append((key, row))
            if len(waiting) >= self.in_flight:
                yield self._answer(*waiting.pop(shuffler.randrange(len(waiting))))
            if self.draining and not self.hang:
                break
        for key, row in waiting:
            yield self._answer(key, row)

    def drain(self) -> None:
        self.draining = True

    def stats(self) -> dict[str, Any]:
        return {"num_answers": self.num_answers}

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _requests(self, shards: Iterable[ShardWork]) -> Iterator[tuple[RequestKey, Row]]:
        for work in shards:
            for row in work.rows:
                for prompt in self.prompts:
                    if (row.index, prompt) not in work.done:
                        yield RequestKey(work.shard, row.index, prompt), row

    def _answer(self, key: RequestKey, row: Row) -> Answer:
        self.num_answers += 1
        self._misbehave(row)
        if self.delay_sec:
            time.sleep(self.delay_sec)
        if self._log is not None:
            self._log.write(f"{os.getpid()} {key.shard} {key.row} {key.prompt}\n".encode())
        if row.error is not None:
            return Answer.failed(key, row.error)
        if row.row_id in self.fail_rows:
            return Answer.failed(key, RowError("corrupt_image"))
        text = self.text(row, key.prompt)
        return Answer(key, text, "stop", 10, 3, len(text))

    def text(self, row: Row, prompt: str) -> str:
        seed = self.settings.generation.seed
        told = f"{seed}|{self.prompts[prompt]}|{row.row_id}".encode()
        return f"{prompt} of {row.row_id}: {hashlib.blake2b(told, digest_size=8).hexdigest()}"

    def _misbehave(self, row: Row) -> None:
        if row.row_id in self.kill_rows or self.num_answers == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if row.row_id in self.eat_rows:
            assert bytearray(os.urandom(4096)) * (1 << 20)
        while row.row_id in self.hang_rows:
            time.sleep(1)
        once = self.num_answers == self.error_at and FakeLabeller.errors_raised == 0
        if once or "FAKE_ERROR_ALWAYS" in os.environ:
            FakeLabeller.errors_raised += 1
            raise EngineError("the fake device is gone")


def _names(variable: str) -> frozenset[str]:
    return frozenset(os.environ.get(variable, "").split(",")) - {""}
