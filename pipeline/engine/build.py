"""From a checkpoint and settings to an engine that is ready to run.

Chooses device, dtype and sizes; loads the weights. Knows no row.
"""

from __future__ import annotations

import os

import torch

from pipeline.engine.engine import Engine
from pipeline.engine.fit import check_weights_fit
from pipeline.engine.guided import Grammars
from pipeline.engine.memory import size_engine
from pipeline.engine.outcome import Outcomes
from pipeline.errors import UserError
from pipeline.kernels.backend import set_invariant
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.fp8 import check_device
from pipeline.models.loading import load_model
from pipeline.settings import EngineSettings, LabelSettings
from pipeline.tokenizer import Tokenizer

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(settings: EngineSettings) -> torch.device:
    """The device that the settings name; `auto` takes a GPU if there is one."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"engine.device is {name!r}, but torch sees no CUDA device.")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"engine.device is {name!r}, but torch sees {found} CUDA devices.")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def set_threads(settings: EngineSettings, workers: int) -> None:
    """Model threads on a CPU: the cores that decoding images leaves, at least one."""
    if settings.threads != "auto":
        torch.set_num_threads(settings.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))


def build_engine(
    settings: LabelSettings, checkpoint: Checkpoint, family: Family, tokenizer: Tokenizer
) -> Engine:
    """Load the model and divide the device. Raises UserError, EngineError."""
    device = choose_device(settings.engine)
    dtype = choose_dtype(settings.model.dtype, device)
    if settings.engine.kv_cache == "fp8":
        check_device(device, "engine.kv_cache", "auto")
    check_weights_fit(family.sizes, settings, device, dtype)
    with torch.inference_mode():
        set_invariant(settings.engine.deterministic)
        model = load_model(checkpoint, family, device, dtype, settings.model.quantization)
        if settings.engine.deterministic and not model.invariant:
            raise UserError(
                f"engine.deterministic is not supported for {family.name} models; leave it false."
            )
        sizes = size_engine(model, settings.engine)
        vocab = model.decoder.config.vocab_size
        outcomes = Outcomes(
            tokenizer,
            lambda: Grammars(checkpoint.tokenizer_json, vocab, family.eos_token_ids),
        )
        return Engine(model, settings.engine, sizes, outcomes)
