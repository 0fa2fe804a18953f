"""SentencePiece's tokenizer.model as tokenizer.json: BPE with byte fallback, as Llama's.

Reads the few fields of the protocol buffer that decide about ids, by hand. A prefix blank, where
the model asks for one, stands before each text that is encoded; `Tokenizer` can leave it out.
Source: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.vocabularies.entries import added_token

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
BLANK = "▁"


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


def from_model(path: Path) -> dict[str, Any]:
    """Read tokenizer.model. Raises ValueError for what is no BPE without normalisation."""
    pieces: list[_Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(path.read_bytes()):
        if field == 1:
            pieces.append(_piece(dict(_fields(value))))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if trainer.get(3, 1) != _BPE:
        raise ValueError("it is no BPE model")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise ValueError("it rewrites text before cutting it, which is not supported")
    return _spec(pieces, bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)))


def _piece(fields: dict[int, Any]) -> _Piece:
    return _Piece(fields[1].decode("utf-8"), float(fields.get(2, 0.0)), fields.get(3, _NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message; values are ints, floats or bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
        elif wire == 2:
            size, place = _varint(data, place)
            if place + size > len(data):
                raise ValueError("the file is cut short")
            yield tag >> 3, data[place : place + size]
            place += size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield tag >> 3, struct.unpack_from("<d" if wire == 1 else "<f", data, place)[0]
            place += size
        else:
            raise ValueError("it is no SentencePiece model")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _merges(pieces: list[_Piece]) -> list[list[str]]:
    """Every way to make a piece of two others, likeliest pieces first."""
    ids = {p.text: i for i, p in enumerate(pieces) if p.kind != _BYTE}
    merges = []
    for piece in sorted(pieces, key=lambda p: -p.score):
        if piece.kind != _NORMAL:
            continue
        text = piece.text
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [way for way in ways if way[0] in ids and way[1] in ids]
        known.sort(key=lambda way: (ids[way[0]], ids[way[1]]))
        merges += [list(way) for way in known]
    return merges


def _spec(pieces: list[_Piece], byte_fallback: bool, prefix: bool) -> dict[str, Any]:
    added = [
        added_token(i, p.text, special=p.kind != _USER_DEFINED)
        for i, p in enumerate(pieces)
        if p.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    unknown = next((p.text for p in pieces if p.kind == _UNKNOWN), None)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    before = [{"type": "Prepend", "prepend": BLANK}] if prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*before, blanks]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": {p.text: i for i, p in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }
