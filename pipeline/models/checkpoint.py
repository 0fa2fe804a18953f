"""A checkpoint's files: where they lie, and the JSON beside the weights.

Opens the model that ships (`demo`), a local folder, or a hub id, whose weights are fetched only
when asked for. Knows no model family, and never reads a weight. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.settings import ModelSettings
from pipeline.vocabularies import tokenizer_text

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.tiktoken")
_CONFIGS = ("config.json", "params.json")
_INDICES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors.index.json",
)
_EDGE_BYTES = 64 << 10  # of a large file's head and tail, for its identity
_PICKLED = (".bin", ".pth", ".pt")
_IDENTIFYING = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors", *_PICKLED}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the hub's layout; `revision` is the resolved commit of a hub id."""

    id: str
    folder: Path
    revision: str | None = None
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, settings: ModelSettings) -> Checkpoint:
        """Find the checkpoint that `settings.id` names. Raises UserError."""
        if settings.id == "demo":
            checkpoint = cls(settings.id, DEMO_FOLDER)
        elif (folder := Path(settings.id).expanduser()).is_dir():
            checkpoint = cls(settings.id, folder.resolve())
        elif _HUB_ID.fullmatch(settings.id):
            folder = _download(settings.id, settings.revision, _SMALL_FILES)
            checkpoint = cls(settings.id, folder, folder.name)
        else:
            raise UserError(
                f"model.id {settings.id!r} is neither an existing folder nor a hub id"
                " such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        if not any((checkpoint.folder / name).is_file() for name in _CONFIGS):
            raise UserError(f"model.id {settings.id!r}: {checkpoint.folder} has no config.json")
        return checkpoint

    def describes_no(self, family: str, error: Exception) -> UserError:
        """What to raise where values of the config files make no model of `family`."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(
            f"model.id {self.id!r}: its config files describe no {family} model ({reason})"
        )

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name`, or None where there is no such file."""
        if name not in self._cache:
            self._cache[name] = _read_json(self.folder / name)
        return self._cache[name]

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or of Mistral's params.json where there is none."""
        return self.json("config.json") or self.json("params.json") or {}

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.json("generation_config.json") or {}

    @property
    def preprocessor_config(self) -> dict[str, Any]:
        """The image processor's settings; those that newer layouts nest go first."""
        nested = (self.json("processor_config.json") or {}).get("image_processor")
        return nested or self.json("preprocessor_config.json") or {}

    @property
    def video_preprocessor_config(self) -> dict[str, Any]:
        """The video processor's settings; older checkpoints have only the image processor's."""
        nested = (self.json("processor_config.json") or {}).get("video_processor")
        own = nested or self.json("video_preprocessor_config.json")
        return own or self.preprocessor_config

    @cached_property
    def tokenizer_json(self) -> str:
        """The text of tokenizer.json, made from another format where the folder has none."""
        return tokenizer_text(self.folder)

    def token_id(self, token: str) -> int | None:
        """The id of an added token, or None."""
        return self._tokens[0].get(token)

    def vocabulary_id(self, token: str) -> int | None:
        """The id of an ordinary token, spelled as in tokenizer.json, or None."""
        return self._tokens[1].get(token)

    @cached_property
    def _tokens(self) -> tuple[dict[str, int], dict[str, int]]:
        """Ids of the added and of the ordinary tokens."""
        try:
            found = json.loads(self.tokenizer_json)
        except (UserError, ValueError):
            return {}, {}
        vocabulary = found.get("model", {}).get("vocab", {})
        added = {entry["content"]: entry["id"] for entry in found.get("added_tokens", ())}
        return added, vocabulary if isinstance(vocabulary, dict) else {}

    def weight_files(self) -> list[Path]:
        """Files that hold the weights, sorted; fetches them first for a hub id."""
        if self.revision is not None:
            self._fetch_weights()
        files = self._safetensors() or self._pickles()
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            name = missing[0] if missing else "*.safetensors or *.bin"
            raise UserError(f"model.id {self.id!r}: {self.folder} has no {name}")
        return files

    @property
    def num_weight_bytes(self) -> int | None:
        """Bytes of the weights as far as the folder tells without a download."""
        for name in _INDICES:
            index = self.json(name)
            if index and "total_size" in index.get("metadata", {}):
                return int(index["metadata"]["total_size"])
        files = [file for file in self._safetensors() or self._pickles() if file.is_file()]
        return sum(file.stat().st_size for file in files) or None

    def identity(self) -> str:
        """Names the content: id and commit, or a hash over a local folder's files."""
        if self.revision is not None:
            return f"{self.id}@{self.revision}"
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(path for path in self.folder.iterdir() if path.is_file()):
            named = file.name.startswith("tokenizer.model.v")
            if named or file.suffix in _IDENTIFYING:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                digest.update(_edges(file))
        if (tower := self.folder / str(self.config.get("mm_vision_tower", ""))) != self.folder:
            # A LLaVA's image tower may lie in a folder of its own.
            digest.update(Checkpoint(self.id, tower).identity().encode() if tower.is_dir() else b"")
        return f"folder:{digest.hexdigest()}"

    def _safetensors(self) -> list[Path]:
        return self._indexed("model.safetensors.index.json") or [
            path
            for path in sorted(self.folder.glob("*.safetensors"))
            if not path.name.startswith("consolidated") or not self._has("model*.safetensors")
        ]

    def _pickles(self) -> list[Path]:
        return self._indexed("pytorch_model.bin.index.json") or sorted(
            self.folder.glob("pytorch_model*.bin")
        )

    def _indexed(self, name: str) -> list[Path]:
        weight_map = (self.json(name) or {}).get("weight_map", {})
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{self.folder / name} names {file!r}, which is no file beside it")
        return [self.folder / file for file in files]

    def _has(self, pattern: str) -> bool:
        return any(self.folder.glob(pattern))

    def _fetch_weights(self) -> None:
        assert self.revision is not None
        indexed = self._indexed("model.safetensors.index.json")
        patterns: Sequence[str] = [path.name for path in indexed] or ["*.safetensors"]
        if all(path.is_file() for path in indexed) and indexed:
            return
        _download(self.id, self.revision, patterns)
        if not self._has("*.safetensors"):
            _download(self.id, self.revision, ["pytorch_model*.bin"])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _edges(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_EDGE_BYTES)
        if (size := path.stat().st_size) <= _EDGE_BYTES:
            return head
        if size <= 16 << 20:
            return head + file.read()
        file.seek(size - _EDGE_BYTES)
        return head + file.read()


def _download(model_id: str, revision: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(patterns)))
    except hub_errors.GatedRepoError as error:
        raise UserError(
            f"model.id {model_id!r} is gated: accept its licence on the hub and set HF_TOKEN"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(f"model.id {model_id!r} has no revision {revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model.id {model_id!r} is neither a folder here nor a model on the hub"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.id {model_id!r} cannot be fetched: {reason}") from error
