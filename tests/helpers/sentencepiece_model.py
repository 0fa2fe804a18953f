"""Writes a small SentencePiece tokenizer.model in Llama's manner, the protocol buffer by hand.

Pieces come from a fixed text: control tokens, the 256 bytes, merges by frequency, letters. For
tests only.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from tests.helpers.tiny_tokenizer import join_pair

NUM_MERGES = 150
TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant
gives helpful, detailed, and polite answers to the user's questions. USER: Describe this image in
detail.
ASSISTANT: The image shows a red square and a blue circle on a white page. What is in the picture?
Answer the questions. How many things are there? [INST] [/INST] system assistant <<SYS>>"""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LLAMA = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
YI = (
    ("<unk>", UNKNOWN),
    ("<|startoftext|>", CONTROL),
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", USER_DEFINED),
    ("<|im_end|>", USER_DEFINED),
)


@lru_cache(1)
def _learned() -> tuple[list[str], list[str]]:
    """Merged pieces by frequency, then single letters."""
    words = Counter(tuple("▁" + word) for word in TEXT.split())
    merged: list[str] = []
    for _ in range(NUM_MERGES):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merged.append("".join(best))
        words = Counter({join_pair(word, best): count for word, count in words.items()})
    return list(dict.fromkeys(merged)), sorted({c for word in TEXT.split() for c in word} | {"▁"})


def pieces(special: Sequence[tuple[str, int]] = LLAMA) -> list[tuple[str, float, int]]:
    """Text, score and kind of every piece, in the order of their ids."""
    merged, letters = _learned()
    made = [(text, 0.0, kind) for text, kind in special]
    made += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return made + [(text, -float(i), NORMAL) for i, text in enumerate([*merged, *letters])]


def model_bytes(special: Sequence[tuple[str, int]] = LLAMA, prefix: bool = True) -> bytes:
    """The content of tokenizer.model."""
    file = b""
    for text, score, kind in pieces(special):
        piece = _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, kind)
        file += _bytes(1, piece)
    ids = _int(40, 0) + _int(41, 1) + _int(42, 2)
    trainer = _int(3, 2) + _int(4, len(pieces(special))) + _int(35, 1) + ids
    normalizer = _bytes(1, b"identity") + _int(3, int(prefix)) + _int(4, 0) + _int(5, 1)
    return file + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
