"""A byte-level BPE tokenizer in Qwen2's manner, with a few hundred tokens, for test checkpoints.

Merges come from a fixed text, so that the file is the same everywhere. Imports no transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

from tokenizers.pre_tokenizers import ByteLevel

NUM_MERGES = 96
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = """You are a helpful assistant. Describe this image in detail. What is in the picture? The
image shows a red square and a blue circle on a white page. Read all text in the image as JSON.
Answer the question with one word, then say why. How many things are there? system user assistant"""
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def merges_of(words: Counter[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Plain BPE training; ties go to the pair that sorts first."""
    merges = []
    for _ in range(NUM_MERGES):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({join_pair(word, best): count for word, count in words.items()})
    return merges


def join_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word, with each place where the pair stands made one symbol."""
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    level = ByteLevel(add_prefix_space=False, use_regex=True)
    words = Counter(tuple(word) for word, _ in level.pre_tokenize_str(TEXT))
    merges = merges_of(words)
    tokens = sorted(ByteLevel.alphabet()) + [a + b for a, b in merges]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


@lru_cache(16)
def special_ids(special: tuple[str, ...] = SPECIAL) -> dict[str, int]:
    """Ids of the control tokens: they follow the ordinary ones."""
    first = len(_vocabulary()[0])
    return {token: first + i for i, token in enumerate(special)}


@lru_cache(16)
def tokenizer_json(special: tuple[str, ...] = SPECIAL) -> str:
    """The text of tokenizer.json, with these control tokens."""
    vocabulary, merges = _vocabulary()
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, i in special_ids(special).items()
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocabulary,
                "merges": [f"{a} {b}" for a, b in merges],
            },
        }
    )
