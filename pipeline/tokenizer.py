"""Text to token ids and back, by the checkpoint's tokenizer.json or what stands for it.

Text of a row is encoded without special tokens: `<|im_end|>` in it becomes ordinary tokens. Where a
tokenizer sets a blank before each text (SentencePiece), text may be `continued`: without it.
Knows no template and no family. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint

_MARKER = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)  # the usual shape of a control token
_CACHED_TEXTS = 512
_CACHED_CHARS = 16_384  # longer texts are not kept


class Tokenizer:
    """Encodes template and row text; decodes answers."""

    def __init__(
        self, checkpoint: Checkpoint, control: Collection[str] = (), spoken: Collection[str] = ()
    ) -> None:
        """`control` as in `protect`; `spoken` are added tokens that texts and answers may hold."""
        text = checkpoint.tokenizer_json
        self._spoken = frozenset(spoken)
        try:
            self._spec = json.loads(text)
            for entry in self._spec.get("added_tokens", ()):
                entry["special"] = entry["special"] and entry["content"] not in self._spoken
            text = json.dumps(self._spec) if self._spoken else text
            self._full = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            where = f"the tokenizer of {checkpoint.folder}"
            raise UserError(f"{where} cannot be read: {error}") from error
        self._full.no_truncation()
        self._full.no_padding()
        self._cached = lru_cache(_CACHED_TEXTS)(self._encode)
        self._added: list[dict[str, Any]] | None = None
        self.protect(control)

    def protect(self, control: Collection[str]) -> None:
        """Never read `control` in a row's text, even where tokenizer.json calls it ordinary."""
        added = [
            dict(entry, special=entry["special"] or self._is_control(entry["content"], control))
            for entry in self._spec.get("added_tokens", ())
        ]
        if added == self._added:
            return
        self._added = added
        spec = dict(self._spec, truncation=None, padding=None, added_tokens=added)
        self._text = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._text.encode_special_tokens = True
        self._continued = self._text
        self.prefix: int | None = None  # id of the blank that is set before a text
        if (without := _without_prefix(spec)) is not None:
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(without))
            self._continued.encode_special_tokens = True
            self.prefix = self._full.token_to_id("▁")
        self._cached.cache_clear()

    def _is_control(self, token: str, control: Collection[str]) -> bool:
        if token in self._spoken:
            return False
        return token in control or _MARKER.fullmatch(token) is not None

    @property
    def size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return self._full.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, control tokens in it count as such."""
        return self.ids(text, special).tolist()

    def ids(self, text: str, special: bool = False, continued: bool = False) -> np.ndarray:
        """As `encode`, int32 and read-only; texts of template and prompts come from a cache."""
        if len(text) > _CACHED_CHARS:
            return self._encode(str(text), special, continued)
        return self._cached(str(text), special, continued)

    def id(self, token: str) -> int:
        """The id of one token. Raises UserError for one that the tokenizer lacks."""
        found = self._full.token_to_id(token)
        if found is None:
            raise UserError(f"the checkpoint's tokenizer has no token {token!r}")
        return found

    def token(self, token_id: int) -> str | None:
        """The spelling of one id in tokenizer.json."""
        return self._full.id_to_token(token_id)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`, without special tokens."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)

    def _encode(self, text: str, special: bool, continued: bool = False) -> np.ndarray:
        ordinary = self._continued if continued else self._text
        tokenizer: Any = self._full if special else ordinary
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        ids.setflags(write=False)
        return ids


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """`spec` without the blank that it sets before a text, or None where it sets none."""
    cut = spec.get("pre_tokenizer") or {}
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        return {**spec, "normalizer": {"type": "Sequence", "normalizers": kept}}
    if cut.get("type") == "Metaspace" and cut.get("prepend_scheme", "always") != "never":
        return {**spec, "pre_tokenizer": {**cut, "prepend_scheme": "never"}}
    return None
