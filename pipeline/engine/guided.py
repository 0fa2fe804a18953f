"""Answers that must follow a JSON schema: which tokens may come next.

llguidance keeps the grammar; here it is bound to a tokenizer and to rows of the lanes' bit mask.
Knows no lane and no model.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.errors import RowError

# NOTE: with free white space, a model can fill its whole answer with line breaks.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Where one answer stands in its schema."""

    def __init__(self, matcher: object, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def mask(self) -> Tensor:
        """Bits [ceil(V / 32)] int32 of the tokens that may come next; all at the end."""
        row = torch.full((self._num_words,), -1, dtype=torch.int32)
        if not self._matcher.is_stopped():  # type: ignore[attr-defined]
            self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), 4 * len(row))  # type: ignore[attr-defined]
        return row

    @property
    def ended(self) -> bool:
        """Whether the answer is complete: nothing may follow."""
        return bool(self._matcher.is_stopped())  # type: ignore[attr-defined]

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():  # type: ignore[attr-defined]
            self._matcher.consume_token(token)  # type: ignore[attr-defined]


class Grammars:
    """Compiles schemas for one tokenizer; a schema is compiled once and copied for each row."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        import llguidance

        self._lib = llguidance
        self._num_words = -(-vocab_size // 32)
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids)
        )
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def matcher(self, schema: str) -> Matcher:
        """A matcher at the start of `schema`. Raises RowError schema_invalid."""
        return Matcher(self._compiled(schema).deep_copy(), self._num_words)

    def _compile(self, schema: str):  # type: ignore[no-untyped-def]
        grammar = self._lib.LLMatcher.grammar_from_json_schema(schema, overrides=SPACING)
        matcher = self._lib.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise RowError("schema_invalid", f"The schema cannot be used: {matcher.get_error()}")
        return matcher
