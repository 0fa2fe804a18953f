"""A published config that is small enough for a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scripts.bench import published
from tests.helpers.deepseek_vl2_checkpoint import IDS, write_deepseek_vl2


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published config named `small`; a folder to write its model into."""
    source = write_deepseek_vl2(tmp_path / "source", "base")
    kept = tmp_path / "published/small"
    kept.mkdir(parents=True)
    for name in ("config.json", "processor_config.json"):
        shutil.copyfile(source / name, kept / name)
    (kept / "tokens.json").write_text(json.dumps(IDS))
    monkeypatch.setattr(published, "PUBLISHED", tmp_path / "published")
    return tmp_path / "model"
