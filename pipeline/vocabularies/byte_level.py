"""Byte-level BPE tokenizers as tokenizer.json: from ranked bytes, or vocab.json + merges.txt.

Knows the spelling that such files give each byte, and how ranks become merges. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# How Qwen2 cuts text before merging; its repositories without tokenizer.json do not say.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Merges = Sequence[tuple[str, str]]


@lru_cache(1)
def byte_spelling() -> dict[int, str]:
    """The printable character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in spelling]
    return spelling | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def spell(token: bytes) -> str:
    return token.decode("latin-1").translate(byte_spelling())


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others: tokens by rank, ways by their parts' ranks."""
    spelled = {spell(token): rank for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(spelled, key=spelled.__getitem__):
        known = []
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in spelled and second in spelled:
                known.append((spelled[first], spelled[second], first, second))
        known.sort()
        merges += [(first, second) for _, _, first, second in known]
    return merges


def byte_level_spec(
    vocabulary: Mapping[str, int],
    merges: Merges,
    split: str,
    added: Sequence[Mapping[str, Any]] = (),
    whole_tokens: bool = False,
    normalizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a tokenizer.json. `whole_tokens`: a word in the vocabulary is one token."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_tokens,
            "vocab": dict(vocabulary),
            "merges": [list(merge) for merge in merges],
        },
    }


def from_merges(path: Path) -> dict[str, Any]:
    """Read merges.txt and the vocab.json beside it: Qwen2's tokenizer."""
    vocabulary = json.loads((path.parent / "vocab.json").read_bytes())
    lines = path.read_text("utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    merges = [(first, second) for first, second in pairs]
    return byte_level_spec(vocabulary, merges, QWEN2_SPLIT, normalizer={"type": "NFC"})
