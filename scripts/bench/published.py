"""Model folders of published checkpoints' sizes with random weights, for any family.

    python scripts/bench/published.py NAME FOLDER [--device cuda]

The JSON files of a checkpoint stand in `published/NAME`; the tensors are those that the family's
own `build` asks for, so no family needs a list of them here. The tokenizer knows single bytes and
the checkpoint's control tokens (`tokens.json`). Speed does not depend on what a model knows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.checkpoint import write_weights  # noqa: E402

PUBLISHED = Path(__file__).resolve().parent / "published"


def names() -> list[str]:
    return sorted(path.name for path in PUBLISHED.iterdir() if path.is_dir())


def make(name: str, folder: Path, device: str = "cpu") -> Path:
    """Write the folder unless it is already whole; the weights' index is written last."""
    if not (folder / "model.safetensors.index.json").exists():
        write_small_files(name, folder)
        write_weights(folder, shapes(folder), device)
    return folder


def write_small_files(name: str, folder: Path) -> None:
    """Everything but the weights."""
    from pipeline.vocabularies.byte_level import byte_level_spec, spell
    from pipeline.vocabularies.entries import added_token

    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((PUBLISHED / name).glob("*.json")):
        if file.name != "tokens.json":
            shutil.copyfile(file, folder / file.name)
    tokens = json.loads((PUBLISHED / name / "tokens.json").read_text("utf-8"))
    taken = set(tokens.values())
    free = (index for index in range(1 << 20) if index not in taken)
    vocabulary = {spell(bytes([byte])): next(free) for byte in range(256)} | tokens
    added = [added_token(index, token) for token, index in tokens.items()]
    spec = byte_level_spec(vocabulary, [], r"\S+|\s+", added)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the family takes, without memory for any of them."""
    return build(folder)[1]


def build(folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The model with tensors that are shapes alone, and what it took."""
    import torch

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.registry import family_for
    from pipeline.settings import ModelSettings
    from scripts.bench.random_weights import RandomWeights, is_tied

    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    family = family_for(checkpoint, settings)
    weights = RandomWeights("meta", torch.bfloat16, tied=is_tied(checkpoint.config))
    module: Any = importlib.import_module(type(family).__module__.rpartition(".")[0] + ".model")
    with torch.inference_mode():
        return module.build(checkpoint, family, weights), weights.taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=names())
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(make(args.name, args.folder, args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
