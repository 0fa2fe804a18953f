"""Writes a checkpoint of any config that transformers takes, with random weights. For tests only.

The config is written as it is given, so that both sides read the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import write_json


def write_twin(
    folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: str
) -> Any:
    """Write the folder and return transformers' model of it."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    read = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config["architectures"][0])._from_config(read).float().eval()
    _randomise(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Values that let information through: no layer's output dwarfs another's."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            table = "embed" in name and "patch" not in name
            values *= 1.0 if table else 1.5 * float(np.prod(parameter.shape[1:])) ** -0.5
        else:
            values = values * 0.1 + (0 if name.endswith("bias") else 1)
        parameter.copy_(values)
