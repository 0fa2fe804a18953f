"""Small jobs for tests: an input, a checkpoint folder, a config, and `vlm-batch` as a process.

The labeller is the fake one, so a job needs no model and no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.helpers.fork_server import ForkedProcess

AnyProcess = ForkedProcess | subprocess.Popen[str]
ROOT = Path(__file__).resolve().parents[2]
FAKE = f"{ROOT / 'tests/helpers/fake_labeller.py'}:FakeLabeller"


@dataclass
class JobFolder:
    """A config with its input; `run` starts the command in a process of its own."""

    folder: Path
    num_rows: int
    config: Path
    out: Path
    env: dict[str, str] = field(default_factory=dict)
    spawns: bool = False  # an interpreter of its own for every process, three times as slow

    @property
    def log(self) -> Path:
        return self.folder / "answers.log"

    @property
    def fault_log(self) -> Path:
        return self.folder / "faults.log"

    def start(self, *args: str, env: dict[str, str] | None = None) -> AnyProcess:
        environment = self._environment() | (env or {})
        if not self.spawns:
            return ForkedProcess(args, self.folder, environment)
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *args],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(
        self, *args: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, env=env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode is not None
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def run(self, *args: str, **how: Any) -> subprocess.CompletedProcess[str]:
        return self.call("run", str(self.config), *args, **how)

    def start_run(self, *args: str, env: dict[str, str] | None = None) -> AnyProcess:
        return self.start("run", str(self.config), *args, env=env)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VLM_BATCH_LABELLER": FAKE,
            "FAKE_LOG": str(self.log),
            "VLM_BATCH_FAULT_LOG": str(self.fault_log),
            **self.env,
        }

    def parts(self) -> list[Path]:
        return sorted((self.out / "data").glob("*.parquet"))

    def table(self) -> pa.Table:
        """All committed rows; fails when a visible file is not whole."""
        tables = [pq.read_table(part) for part in self.parts()]
        return pa.concat_tables(tables)

    def content(self) -> list[dict[str, Any]]:
        """Rows and answers without what may differ between runs: the attempts."""
        rows = self.table().to_pylist()
        for row in rows:
            for meta in row["meta"].values():
                meta.pop("attempt")
        return rows

    def generated(self) -> Counter[str]:
        """How often each answer was generated, over all runs; proofs of health do not count."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        answers = (line.split(" ", 1)[1] for line in lines)
        return Counter(answer for answer in answers if not answer.startswith("proof "))

    def wait_for(self, pattern: str, timeout: float = 20) -> list[Path]:
        """Wait until files of a pattern exist in the run folder."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if found := list(self.out.glob(pattern)):
                return found
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} after {timeout} s")

    def wait_for_answers(self, count: int, timeout: float = 20) -> None:
        until = time.monotonic() + timeout
        while sum(self.generated().values()) < count:
            assert time.monotonic() < until, f"no {count} answers after {timeout} s"
            time.sleep(0.02)


def make_input(path: Path, num_rows: int, prefix: str = "row") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{prefix}-{i:05d}" for i in range(num_rows)]
    columns = {"id": ids, "url": [f"https://example.org/{i}" for i in ids], "word": ids}
    pq.write_table(pa.table(columns), path, row_group_size=16)


def make_job(
    folder: Path, num_rows: int = 60, rows_per_shard: int = 10, files: int = 2, **extra: Any
) -> JobFolder:
    """A job of `files` equal files; `extra` is merged into the config by top-level key."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text('{"model_type": "fake"}')
    for number in range(files):
        make_input(folder / f"input/part-{number}.parquet", num_rows // files, f"f{number}")
    out = folder / "out"
    config: dict[str, Any] = {
        "model": {"id": str(checkpoint)},
        "input": {"path": str(folder / "input/*.parquet"), "id": "id", "image": None},
        "prompts": {"caption": "Describe {word}.", "ocr": "Read {word}."},
        "output": {"path": str(out), "rows_per_shard": rows_per_shard},
        "checkpoint": {"interval_sec": 0.2, "lease_sec": 2},
    }
    config["input"]["keep"] = ["url"]
    for key, value in extra.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return JobFolder(folder, num_rows, path, out)


def end(process: AnyProcess, number: int = signal.SIGKILL) -> int:
    """Signal a process and wait for its end."""
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode is not None
    return process.returncode


def as_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
