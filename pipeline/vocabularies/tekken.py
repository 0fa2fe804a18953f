"""Mistral's tekken.json as tokenizer.json.

Special tokens hold the first ids, ordinary ones follow in the order of their ranks. Knows no
prompt: which special token stands where, the template says.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from pipeline.vocabularies.byte_level import byte_level_spec, merges_of, spell
from pipeline.vocabularies.entries import added_token

# What files of version 3 leave out: the special tokens of their time, in the order of their ids.
_VERSION_3 = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip


def from_tekken(path: Path) -> dict[str, Any]:
    """Read tekken.json. A vocabulary longer than its config says is cut there."""
    file = json.loads(path.read_bytes())
    config = file["config"]
    special = _special_tokens(file, int(config.get("default_num_special_tokens") or 0))
    entries = sorted(file["vocab"], key=lambda entry: int(entry["rank"]))
    if config.get("default_vocab_size"):
        entries = entries[: int(config["default_vocab_size"]) - len(special)]
    ranks = {base64.b64decode(entry["token_bytes"]): i for i, entry in enumerate(entries)}
    vocabulary = {spell(token): rank + len(special) for token, rank in ranks.items()}
    vocabulary |= {token: index for index, token in enumerate(special)}
    added = [added_token(index, token) for index, token in enumerate(special)]
    merges = merges_of(ranks)
    return byte_level_spec(vocabulary, merges, config["pattern"], added, whole_tokens=True)


def _special_tokens(file: dict[str, Any], count: int) -> list[str]:
    """Names of the first ids, those without a name as tekken calls them."""
    listed = file.get("special_tokens")
    if listed is None:
        named = dict(enumerate(_VERSION_3))
    else:
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    count = count or len(named)
    return [named.get(index, f"<SPECIAL_{index}>") for index in range(count)]
