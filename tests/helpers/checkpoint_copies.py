"""Small checkpoints made from others: with one wrong tensor, or as transformers saves them.

Knows nothing of what a model makes of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def set_tensor(folder: Path, name: str, shape: tuple[int, ...] | None) -> Path:
    """Put zeros of this shape under the name, into the first file; None takes the tensor away."""
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = load_file(file)
        tensors.pop(name, None)
        if shape is not None and number == 0:
            tensors[name] = np.zeros(shape, np.float32)
        save_file(tensors, file)
    return folder


def copy_with_tensor(folder: Path, target: Path, name: str, shape: tuple[int, ...] | None) -> Path:
    """As `set_tensor`, of a copy; the folder stays as it is."""
    shutil.copytree(folder, target)
    return set_tensor(target, name, shape)


def save_twin(model: Any, folder: Path, twin: Path) -> Path:
    """What transformers saves of the model, with the tokenizer and the like of its folder."""
    model.save_pretrained(twin)
    for file in folder.glob("*.json"):
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(file, twin / file.name)
    return twin


def set_keys(folder: Path, file: str, **changes: Any) -> Path:
    """Change keys at the top of one of the folder's JSON files."""
    path = folder / file
    kept = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(kept | changes), encoding="utf-8")
    return folder
