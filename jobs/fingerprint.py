"""What can change an answer, as hashes by field; a run folder belongs to one such set.

Where and how fast a job runs is left out (paths, shard size, engine), and so are the limits that
only decide whether a row is read. A checkpoint counts by its content, not by where it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jobs.config import JobConfig

CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json", "tokenizer*.json",
    "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model.bin.index.json", "*.tiktoken", "adapter_config.json",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin")
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 16

_INPUT_FIELDS = ("source", "id", "image", "video", "audio", "keep", "messages", "base_path")
_MODEL_FIELDS = (
    "chat_template", "dtype", "quantization", "max_pixels", "min_pixels", "pan_and_scan",
)  # fmt: skip
_ENGINE_FIELDS = ("deterministic", "max_context")
_LATER_FIELDS = {"kv_cache": "auto"}  # of the engine; as they were in older run folders


@dataclass(frozen=True)
class Fingerprint:
    """Hashes by dotted field."""

    fields: Mapping[str, str]

    @property
    def digest(self) -> str:
        return _hash(sorted(self.fields.items()))


def fingerprint(config: JobConfig, checkpoint: Mapping[str, str] | str) -> Fingerprint:
    """The job's fingerprint; `checkpoint` is `checkpoint_identity`'s, or any fields like it."""
    identity = {"content": checkpoint} if isinstance(checkpoint, str) else checkpoint
    values: dict[str, Any] = {f"model.{key}": value for key, value in identity.items()}
    values |= {f"model.{name}": getattr(config.model, name) for name in _MODEL_FIELDS}
    values |= {f"input.{name}": getattr(config.input, name) for name in _INPUT_FIELDS}
    values |= {f"video.{name}": value for name, value in config.video.model_dump().items()}
    values |= {f"engine.{name}": getattr(config.engine, name) for name in _ENGINE_FIELDS}
    for name, before in _LATER_FIELDS.items():
        if (value := getattr(config.engine, name)) != before:
            values[f"engine.{name}"] = value
    values |= {f"generation.{k}": v for k, v in config.generation.model_dump().items()}
    values["system"] = config.system
    values["prompts"] = list(config.prompts)  # the columns' order
    for name, prompt in config.prompts.items():
        values[f"prompts.{name}.text"] = prompt.text
        values[f"prompts.{name}.schema"] = config.answer_schema(name)
        values[f"prompts.{name}.max_new_tokens"] = prompt.max_new_tokens
    return Fingerprint({key: _hash(value) for key, value in sorted(values.items())})


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Fields that differ, a field that is known to one side only among them."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def checkpoint_identity(folder: Path | str) -> dict[str, str]:
    """Identity of a checkpoint's content: every small file whole, of each weight file its size,
    its head and evenly spaced samples. The same wherever the folder lies.
    """
    files = sorted(_relevant(Path(folder)), key=lambda path: path.name)
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES]
    others = [path for path in files if path.suffix not in WEIGHT_SUFFIXES]
    return {
        "weights": _hash([(path.name, _sampled(path)) for path in weights]),
        "files": _hash([(path.name, _whole(path)) for path in others]),
    }


def _relevant(folder: Path) -> Iterable[Path]:
    for path in folder.iterdir():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in CHECKPOINT_FILES):
            yield path


def _whole(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= SAMPLE_BYTES * (NUM_SAMPLES + 1):
        digest.update(path.read_bytes())
        return digest.hexdigest()
    step = (size - SAMPLE_BYTES) // NUM_SAMPLES
    with open(path, "rb") as file:
        for number in range(NUM_SAMPLES + 1):
            file.seek(number * step)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
