"""submitit launches a run on a real SLURM, interrupts it, and it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.submitit_task import RunTask
from tests.helpers.job_folder import FAKE, ROOT, make_job

submitit = pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.usefixtures("slurm")
def test_an_interrupted_task_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path / "job", 160, rows_per_shard=10)
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "VLM_BATCH_LABELLER": FAKE,
        "FAKE_LOG": str(job.log),
        "FAKE_DELAY_SEC": "0.03",
    }.items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="slurm")
    executor.update_parameters(timeout_min=5, mem_gb=0.5, slurm_array_parallelism=2)
    tasks = executor.map_array(RunTask(str(job.config)), range(2))
    job.wait_for_answers(60, timeout=90)
    tasks[0]._interrupt(timeout=False)
    assert [task.result() for task in tasks] == [0, 0]
    assert job.table().num_rows == 160
    assert set(job.generated().values()) == {1}
