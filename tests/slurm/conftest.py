"""A real SLURM on this machine for the tests of this folder: two nodes, four CPUs each.

Installed when it is absent and this is root on Debian; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm_local.sh")
MAX_ARRAY = 5
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def _install(request: pytest.FixtureRequest) -> None:
    """Debian's packages, where there are none; says so beside the tests' dots."""
    if all(map(shutil.which, PROGRAMS)):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("needs slurm-wlm and munge, or root on Debian to install them")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\ninstalling Debian's slurm-wlm and munge for the SLURM tests", file=sys.stderr)
    done = subprocess.run(
        [str(SCRIPT), "install"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        pytest.skip(f"slurm-wlm could not be installed: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def slurm_conf(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The cluster's configuration file."""
    _install(request)
    folder = tmp_path_factory.mktemp("cluster")
    sizes = {"NODES": "2", "CPUS": "4", "GPUS": "2", "MAX_ARRAY": str(MAX_ARRAY)}
    env = os.environ | {f"SLURM_LOCAL_{name}": value for name, value in sizes.items()}
    started = subprocess.run(
        [str(SCRIPT), "start", str(folder)], capture_output=True, text=True, env=env, timeout=120
    )
    if started.returncode:
        pytest.skip(f"SLURM does not start here: {started.stderr.strip()[-300:]}")
    yield str(folder / "slurm.conf")
    subprocess.run([str(SCRIPT), "stop", str(folder)], capture_output=True, timeout=60, check=False)


@pytest.fixture
def slurm(slurm_conf: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cluster, known to all commands that the test starts."""
    monkeypatch.setenv("SLURM_CONF", slurm_conf)
    return slurm_conf
