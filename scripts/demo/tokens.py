"""The byte-level BPE tokenizer of the demonstration model: training it, writing it, using it fast.

Same pre-tokenisation and the same names of special tokens as Qwen2.5-VL's, with a small vocabulary.
`FastEncoder` gives the same ids for plain English text by looking whole words up.
"""

import json
import random
import re
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from demo import language
from demo.scenes import Sampler
from demo.vocabulary import COLOUR_NAMES, NOUNS

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
VOCABULARY = 1024  # without the special tokens
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = re.compile(
    r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "You are a helpful assistant."
ENGLISH = (
    "The image shows what you can see in this picture. Please answer with yes or no, and "
    "tell me how many of them there are, where they are and which one is on the left side"
    " or on the right side. Describe it in one sentence. Write a short caption. What is "
    "the main object? Are there any people, animals, food or cars? It has been there for "
    "some time because that was their first day out with all of us. Return a JSON list "
    "with label, score, name, caption, title, text, type, value, color, count, "
    "description and keywords.",
    "system user assistant",
    "People from many countries would like to know about other things such as water, "
    "buildings, streets, trees, mountains, windows, tables, houses, shops, clothes, "
    "games, music, books, numbers, letters, words and lines. During the evening someone "
    "should make another good photograph because these might also show where everything "
    "happened before and after work, through the long year, between each place, under "
    "every great old bridge.",
)
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(sampler: Sampler, scenes: int = 3000) -> list[str]:
    """Texts in which every word of the task occurs often, and a little ordinary English."""
    rng = random.Random(3)
    out = list(ENGLISH) * 40
    for noun in NOUNS:
        words = (f" {noun.name}", noun.name, f" {noun.plural}")
        out += [text for word in words for text in (word,) * 60]
    out += [
        text
        for word in COLOUR_NAMES
        for text in (word, f" {word}", word.capitalize())
        for _ in range(60)
    ]
    for _ in range(scenes):
        scene = sampler.scene(rng)
        out += [
            language.CAPTION,
            language.OBJECTS,
            language.caption(scene),
            language.objects(scene),
        ]
        out += [rng.choice(language.CAPTION_VARIANTS)]
        for kind in language.QUESTION_KINDS:
            out += language.question(scene, rng, kind)[1:]
    return out


def train(texts: list[str]) -> Tokenizer:
    """A tokenizer of VOCABULARY byte-level pieces and the special tokens after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(name)): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name in SPECIAL
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class FastEncoder:
    """Token ids of plain ASCII text, one dictionary look-up a word."""

    def __init__(self, tokenizer: Tokenizer):
        """Keeps the tokenizer for words it has not met yet."""
        self.tokenizer, self.words = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`, which must hold no special token."""
        out: list[int] = []
        for word in _PLAIN.findall(text):
            ids = self.words.get(word)
            if ids is None:
                ids = self.words[word] = self.tokenizer.encode(word, add_special_tokens=False).ids
            out += ids
        return out

    def special(self, name: str) -> int:
        """The id of one special token."""
        return self.tokenizer.token_to_id(name)
