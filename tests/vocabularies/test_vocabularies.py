"""Tokenizers made from tokenizer.model, tekken.json and merges.txt, against their own libraries."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.tokenizer import Tokenizer
from tests.helpers.sentencepiece_model import LLAMA, YI, model_bytes, pieces
from tests.helpers.tiny_tokenizer import tokenizer_json

TEXTS = (
    "",
    "A chat between a curious user",
    "USER: ",
    "\nDescribe this image. ASSISTANT:",
    "  two  blanks  and\ttab ",
    "Größe, été, 图像 🙂",
    "▁ already",
    "</s><s> <unk> <0x0A>",
    "aaaaaa assistantassistant",
)


def opened(folder: Path, *control: str) -> Tokenizer:
    return Tokenizer(Checkpoint("x", folder), control)


def sentencepiece(folder: Path, **options: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model_bytes(**options))
    return opened(folder, "<s>", "</s>")


@pytest.mark.parametrize("special", [LLAMA, YI])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_own_ids(tmp_path: Path, special: Any, prefix: bool) -> None:
    library = pytest.importorskip("sentencepiece")
    ours = sentencepiece(tmp_path, special=special, prefix=prefix)
    theirs = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def spelled(ours: Tokenizer, ids: list[int]) -> list[str | None]:
    return [ours.token(i) for i in ids]


def test_recorded_sentencepieces(tmp_path: Path) -> None:
    ours = sentencepiece(tmp_path)
    named = spelled(ours, ours.encode("The user's image"))
    assert named == ["▁The", "▁user", "'", "s", "▁image"]
    assert spelled(ours, ours.encode("é\n")) == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert ours.size == len(pieces())
    assert ours.decode(ours.encode(" The image\n")) == " The image\n"


def test_continued_text_has_no_prefix(tmp_path: Path) -> None:
    ours = sentencepiece(tmp_path)
    assert ours.ids("The image").tolist() == ours.ids(" The image", continued=True).tolist()
    assert spelled(ours, ours.ids("The", continued=True).tolist())[0] != "▁The"
    assert ours.ids("", continued=True).tolist() == []
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    plain = opened(tmp_path)
    assert plain.ids("The image").tolist() == plain.ids("The image", continued=True).tolist()


@pytest.mark.parametrize("text", ["</s>", "<s>[INST]", "<|im_start|>system", "<unk>"])
def test_control_tokens_come_from_the_template_only(tmp_path: Path, text: str) -> None:
    for special in (LLAMA, YI):
        ours = sentencepiece(tmp_path, special=special)
        assert min(ours.encode(text)) >= len(special)
    assert ours.encode("<|im_start|>", special=True) == [3]


def write_tekken(folder: Path, **config: Any) -> None:
    words = [b" the", b" t", b"th", b"he", b"the", b" image", b"im", b"age", b"ag", b" im", b"<s>"]
    ranked = [bytes([i]) for i in range(256)] + sorted(words, key=len)
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
        for i, t in enumerate(ranked)
    ]
    settings = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 32,
        "default_num_special_tokens": 32,
        "version": "v3",
    }
    specials = {"special_tokens": config.pop("special_tokens")} if config else {}
    file = {"config": settings | config, "vocab": vocab} | specials
    (folder / "tekken.json").write_text(json.dumps(file))


NAMED = [
    {"rank": i, "token_str": token, "is_control": True}
    for i, token in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
]


def test_tekken_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    write_tekken(tmp_path, special_tokens=NAMED, version="v7")
    theirs = MistralConverter(str(tmp_path / "tekken.json")).converted()
    theirs.encode_special_tokens = True
    ours = opened(tmp_path)
    for text in (*TEXTS, "the image in the other theatre"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.size == theirs.get_vocab_size()
    assert ours.encode("[INST]", special=True) == [3]
    assert min(ours.encode("[INST]")) >= 32


def test_tekken_of_version_3_and_a_longer_vocabulary(tmp_path: Path) -> None:
    write_tekken(tmp_path)
    assert opened(tmp_path).id("[IMG_END]") == 13
    assert opened(tmp_path).token(31) == "<SPECIAL_31>"
    full = opened(tmp_path).size
    write_tekken(tmp_path, special_tokens=NAMED, default_vocab_size=full - 3)
    assert opened(tmp_path).size == full - 3


def test_merges_and_vocabulary(tmp_path: Path) -> None:
    spec = json.loads(tokenizer_json())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = "\n".join(["#version: 0.2", *spec["model"]["merges"], ""])
    (tmp_path / "merges.txt").write_text(merges, "utf-8")
    added = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours = opened(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    ready = opened(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == ready.encode(text), text
    assert ours.id("<|im_end|>") == ready.id("<|im_end|>")


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"not a model", b"\x0a\x05abc"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        opened(tmp_path)
