"""One entry of a tokenizer.json's `added_tokens`. Knows no file format."""

from __future__ import annotations

from typing import Any


def added_token(index: int, content: str, special: bool = True) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **plain}
