"""A disk that is really full or read-only, a folder that is immutable, memory that runs out."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.job_folder import JobFolder, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 40
CGROUPS = Path("/sys/fs/cgroup/memory")
MEMORY = 700 << 20
ADDRESSES = 3 << 30  # of a process's address space; libraries map much that they never touch


class Disk:
    """A small filesystem of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a filesystem")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def _job_on(disk: Disk, tmp_path: Path) -> JobFolder:
    out = disk.folder / "out"
    job = make_job(tmp_path / "job", NUM_ROWS, output={"path": str(out), "rows_per_shard": 5})
    job.out = out
    return job


def _finish(job: JobFolder, tally: Tally) -> None:
    done = job.run()
    assert done.returncode == 0, done.stderr
    ids = [f"f{file}-{row:05d}" for file in (0, 1) for row in range(NUM_ROWS // 2)]
    found = job.content()
    wanted = [row | {"row_id": id_} for row, id_ in zip(found, ids, strict=False)]
    tally.check_rows(found, wanted)
    assert len(found) == NUM_ROWS
    assert {row["status"] for row in found} == {"ok"}
    verified = job.call("verify", str(job.out))
    assert verified.returncode == 0, verified.stdout


SIZES = range(24, 140, 8)  # KiB; a whole run folder takes some more


@pytest.mark.parametrize(
    "size", [64, *(pytest.param(s, marks=pytest.mark.crash) for s in SIZES if s != 64)]
)
def test_a_full_disk(disk: Disk, tmp_path: Path, tally: Tally, size: int) -> None:
    """Full at one step or another: one sentence, and with more room the run goes on."""
    disk.mount(f"size={size}k")
    job = _job_on(disk, tmp_path)
    ended = job.run()
    assert ended.returncode in (0, 1, 2), ended.stderr
    assert "Traceback" not in ended.stderr
    if ended.returncode:
        assert "No space left" in ended.stderr
        tally.injected("full disk")
    disk.remount("size=8m")
    _finish(job, tally)


def test_a_disk_that_is_read_only(disk: Disk, tmp_path: Path, tally: Tally) -> None:
    disk.mount("size=8m")
    job = _job_on(disk, tmp_path)
    assert job.run(env={"FAKE_KILL_AT": "33"}).returncode == -signal.SIGKILL
    disk.remount("ro")
    refused = job.run()
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "Read-only" in refused.stderr
    assert job.call("status", str(job.out)).returncode == 0
    assert job.call("verify", str(job.out)).returncode == 75
    disk.remount("rw")
    tally.injected("SIGKILL")
    tally.injected("read-only disk")
    _finish(job, tally)


@pytest.mark.parametrize("name", ["data", "tmp", "leases", "journal"])
def test_a_folder_that_nobody_may_write(
    disk: Disk, tmp_path: Path, tally: Tally, name: str
) -> None:
    """Immutable while the run is at work, as an administrator's hand or a snapshot makes it."""
    disk.mount("size=8m")
    job = _job_on(disk, tmp_path)
    run = job.start_run(env={"FAKE_DELAY_SEC": "0.02"})
    job.wait_for_answers(15)
    (folder,) = job.wait_for(name)
    if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        run.kill()
        run.communicate(timeout=20)
        pytest.skip("this filesystem has no immutable folders")
    _, err = run.communicate(timeout=60)
    subprocess.run(["chattr", "-i", str(folder)], check=True)
    assert run.returncode in (0, 1), err
    assert "Traceback" not in err
    tally.injected("read-only folder")
    _finish(job, tally)


@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_a_row_for_which_there_is_no_memory(
    tmp_path: Path, tally: Tally, workers: tuple[str, ...]
) -> None:
    """A MemoryError ends the attempt; the row that always raises it is given up, no other."""
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=10)
    env = {"FAKE_EAT_ROWS": "f0-00013", "FAKE_MEMORY": str(ADDRESSES)}
    ended = job.run(*workers, env=env)
    assert ended.returncode == 0, ended.stderr
    assert "MemoryError" in ended.stderr
    _check_given_up(job, "f0-00013")
    tally.injected("out of memory", 2)


def _check_given_up(job: JobFolder, row_id: str) -> None:
    failed = [row for row in job.content() if row["status"] != "ok"]
    assert [(row["row_id"], row["error_code"]) for row in failed] == [(row_id, "worker_crash")]
    assert len(job.content()) == NUM_ROWS
    assert job.call("verify", str(job.out)).returncode == 0


@pytest.mark.crash
@pytest.mark.skipif(not os.access(CGROUPS, os.W_OK), reason="needs a memory cgroup to make")
def test_the_kernels_out_of_memory_killer(tmp_path: Path, tally: Tally) -> None:
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=10)
    group = CGROUPS / f"vlm-batch-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(MEMORY))
    (group / "memory.memsw.limit_in_bytes").write_text(str(MEMORY))
    try:
        run = job.start_run("--workers", "1", env={"FAKE_EAT_ROWS": "f1-00004"})
        (group / "cgroup.procs").write_text(str(run.pid))
        _, err = run.communicate(timeout=90)
        assert run.returncode == 0, err
        assert "died (signal 9)" in err
        kills = err.count("died (signal 9)")
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
    tally.injected("OOM kill", kills)
    _check_given_up(job, "f1-00004")
