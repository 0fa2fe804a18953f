"""A real SLURM on this machine for the tests of this folder: two nodes, four CPUs each.

Installed when it is absent and this is root on Debian; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm_local.sh")


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster's configuration file."""
    if not shutil.which("slurmctld") and (os.geteuid() != 0 or not shutil.which("apt-get")):
        pytest.skip("needs slurm-wlm, or root on Debian to install it")
    folder = tmp_path_factory.mktemp("cluster")
    env = {**os.environ, "SLURM_LOCAL_NODES": "2", "SLURM_LOCAL_CPUS": "4"}
    started = subprocess.run(
        [str(SCRIPT), "start", str(folder)], capture_output=True, text=True, env=env, timeout=120
    )
    if started.returncode:
        pytest.fail(f"SLURM did not start: {started.stderr}")
    yield str(folder / "slurm.conf")
    subprocess.run([str(SCRIPT), "stop", str(folder)], capture_output=True, timeout=60, check=False)


@pytest.fixture
def slurm(slurm_conf: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cluster, known to all commands that the test starts."""
    monkeypatch.setenv("SLURM_CONF", slurm_conf)
    return slurm_conf
