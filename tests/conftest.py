"""What every test gets: one thread a process, no hub, a clean environment, the GPU rule.

Imports no torch itself, so that the tests of `jobs/` start in a blink.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.crash_summary import (  # noqa: F401 - hooks
    pytest_sessionfinish,
    pytest_terminal_summary,
)

ROOT = Path(__file__).resolve().parents[1]

# NOTE: read by torch, tokenizers and huggingface_hub when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

NASTY_NAMES = ("two words", 'quote\'d "twice"', "semi;colon $HOME `id`", "back\\slash", "ümläut 图")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; torch is asked only if one was collected."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith(("VLM_BATCH_", "SLURM_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(params=NASTY_NAMES)
def nasty_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder whose name breaks careless quoting; the test runs once for each name."""
    folder = tmp_path / request.param
    folder.mkdir()
    return folder
