"""The wheel holds what an installed command needs, and no more; it works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 24 << 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_it_holds_every_module(names: list[str]) -> None:
    modules = [p for top in ("pipeline", "jobs") for p in (ROOT / top).rglob("*.py")]
    assert {str(p.relative_to(ROOT)) for p in modules} <= set(names)


def test_it_holds_the_configs(names: list[str]) -> None:
    shipped = {f"jobs/shipped_configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    assert shipped <= set(names)


def test_it_holds_the_demo(names: list[str]) -> None:
    files = [p for p in (ROOT / "pipeline/demo").rglob("*") if p.is_file()]
    wanted = {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    assert wanted <= set(names)


def test_it_holds_nothing_else(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jobs", "pipeline"}


def test_it_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_it_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "validate", "configs/demo.yaml"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
