"""One small checkpoint of each Qwen kind for the whole engine suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import write_qwen2_5_vl, write_qwen2_vl


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    write_qwen2_vl(root / "qwen2_vl")
    write_qwen2_5_vl(root / "qwen2_5_vl")
    return {kind: root / kind for kind in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]
