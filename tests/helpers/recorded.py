"""What official code that this repository does not hold made of our small checkpoints.

`tests/recorded/NAME` keeps it with the script that recorded it. Where VLM_BATCH_OFFICIAL_NAME names
a checkout of that code, and VLM_BATCH_OFFICIAL_PYTHON an interpreter that can import it, the script
runs anew and the tests compare with what the code says today.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ)  # as it was before tests were shielded from it


@dataclass(frozen=True)
class Recording:
    """Prompt ids and the like, and tensors."""

    facts: dict[str, Any]
    tensors: dict[str, np.ndarray]


@cache
def recording(name: str) -> Recording:
    """The recording, made now where the official code is at hand."""
    kept = ROOT / "tests/recorded" / name
    source = ENVIRONMENT.get(f"VLM_BATCH_OFFICIAL_{name.upper()}")
    if source is None:
        return _read(kept, name)
    python = ENVIRONMENT.get("VLM_BATCH_OFFICIAL_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        env = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), source])}
        script = str(kept / "record.py")
        done = subprocess.run(
            [python, script, folder], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return _read(Path(folder), name)


def _read(folder: Path, name: str) -> Recording:
    facts = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return Recording(facts, load_file(folder / f"{name}.safetensors"))
