"""Moonshot's tiktoken.model as tokenizer.json: ranked bytes, then 256 reserved special tokens.

The names of special tokens stand in tokenizer_config.json; those without one are reserved. The
file does not say how text is cut: the pattern is that of the Kimi family's own tokenizer code.
Knows no prompt.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pipeline.vocabularies.byte_level import byte_level_spec, merges_of, spell
from pipeline.vocabularies.entries import added_token

NUM_RESERVED = 256
_LOWER, _UPPER = (
    r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]",
    r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]",
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_SPLIT = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def from_tiktoken(path: Path) -> dict[str, Any]:
    """Read tiktoken.model: a token in base64 and its rank a line."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2 …")
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    first = len(ranks)
    added = [
        added_token(index, f"<|reserved_token_{index}|>")
        for index in range(first, first + NUM_RESERVED)
    ]
    return byte_level_spec(vocabulary, merges_of(ranks), KIMI_SPLIT, added, whole_tokens=True)
