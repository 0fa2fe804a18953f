"""A checkpoint's tokenizer as the text of a tokenizer.json, whatever file it ships.

tokenizer.json itself comes first; then SentencePiece's tokenizer.model, Mistral's tekken.json,
Moonshot's tiktoken.model, and vocab.json with merges.txt. Knows no template and no family. Imports
neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.vocabularies.byte_level import from_merges
from pipeline.vocabularies.entries import added_token
from pipeline.vocabularies.sentencepiece import from_model
from pipeline.vocabularies.tekken import from_tekken
from pipeline.vocabularies.tiktoken import from_tiktoken

Reader = Callable[[Path], dict[str, Any]]
_READERS: dict[str, Reader] = {  # file name or pattern
    "tokenizer.model": from_model,
    "tokenizer.model.v*": from_model,
    "tekken.json": from_tekken,
    "tiktoken.model": from_tiktoken,
    "merges.txt": from_merges,
}


def tokenizer_text(folder: Path) -> str:
    """The text of the folder's tokenizer.json, or of one made from another format.

    Raises: UserError when there is no tokenizer, or none that can be read.
    """
    ready = folder / "tokenizer.json"
    if ready.is_file():
        return _completed(ready.read_text("utf-8"), folder)
    for name, read in _READERS.items():
        for path in sorted(folder.glob(name)):
            return json.dumps(_with_added(_read(path, read), folder), ensure_ascii=False)
    names = ", ".join(("tokenizer.json", *_READERS))
    raise UserError(f"{folder} has no tokenizer: none of {names}")


def _completed(text: str, folder: Path) -> str:
    """tokenizer.json with what only tokenizer_config.json adds, as transformers completes it."""
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    names = [entry["content"] for entry in decoder.values()]
    start = text.find('"added_tokens"')
    head = text[start : text.find('"normalizer"', start)]
    # NOTE: looked for as text, because reading a large file costs more than all else here.
    if all(json.dumps(n) in head or json.dumps(n, ensure_ascii=False) in head for n in names):
        return text
    try:
        spec = json.loads(text)
    except ValueError:
        return text  # whoever reads it will say so
    added = list(spec.get("added_tokens") or ())
    known = {entry["content"] for entry in added}
    for index, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            made = added_token(int(index), entry["content"], bool(entry.get("special", False)))
            added.append(made | {key: entry[key] for key in made.keys() & entry.keys()})
    return json.dumps(spec | {"added_tokens": added}, ensure_ascii=False)


def _read(path: Path, read: Reader) -> dict[str, Any]:
    try:
        return read(path)
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error


def _with_added(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`spec` with the tokens that the files beside it add."""
    known = {entry["id"]: entry for entry in spec["added_tokens"]}
    for token, index in _json(folder / "added_tokens.json").items():
        known.setdefault(index, added_token(index, token))
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for index, entry in decoder.items():
        made = added_token(int(index), entry["content"], bool(entry.get("special", True)))
        known[int(index)] = made | {k: entry[k] for k in ("lstrip", "rstrip") if k in entry}
    return spec | {"added_tokens": [known[index] for index in sorted(known)]}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return value if isinstance(value, dict) else {}
