"""In no family can the text of a row, of an answer or of the system forge a token of control."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.registry import family_for
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers import (
    checkpoints,
    deepseek_vl2_checkpoint,
    gemma_checkpoint,
    janus_checkpoint,
    kimi_vl_checkpoint,
    llava_checkpoint,
    minicpm_checkpoint,
    mllama_checkpoint,
    pixtral_checkpoint,
    smolvlm_checkpoint,
)

WRITERS: dict[str, Callable[[Path], Any]] = {
    "qwen2-vl": checkpoints.write_qwen2_vl,
    "qwen2.5-vl": checkpoints.write_qwen2_5_vl,
    "qwen3-vl": checkpoints.write_qwen3_vl,
    "gemma3": gemma_checkpoint.write_gemma3,
    "mllama": mllama_checkpoint.write_mllama,
    "deepseek-vl2": lambda folder: deepseek_vl2_checkpoint.write_deepseek_vl2(folder, "small"),
    "kimi-vl": kimi_vl_checkpoint.write_kimi_vl,
    "janus": janus_checkpoint.write_janus,
    "minicpm-v": minicpm_checkpoint.write_minicpm_v,
    "minicpm-o": minicpm_checkpoint.write_minicpm_o,
    "pixtral": pixtral_checkpoint.write_mistral,
    "pixtral-twin": pixtral_checkpoint.write_twin,
    "smolvlm": smolvlm_checkpoint.write_smolvlm,
    **{
        f"llava {kind}": lambda folder, kind=kind: llava_checkpoint.write_original(folder, kind)
        for kind in llava_checkpoint.KINDS
    },
}


@pytest.fixture(scope="module", params=WRITERS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Tokenizer, dict[str, int]]:
    """A family with its tokenizer, and its control tokens with their ids."""
    folder = tmp_path_factory.mktemp("model")
    WRITERS[request.param](folder)
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    found = family_for(checkpoint, settings)
    tokenizer = Tokenizer(checkpoint, found.control, found.template.spoken)
    added = json.loads(checkpoint.tokenizer_json).get("added_tokens", ())
    names = {entry["content"] for entry in added if entry["special"]} | set(found.control)
    known = {name: checkpoint.token_id(name) for name in names - set(found.template.spoken)}
    return found, tokenizer, {name: id_ for name, id_ in known.items() if id_ is not None}


def _count(family: Family, tokenizer: Tokenizer, turns: tuple[Turn, ...], ids: list[int]) -> int:
    tokens, _ = family.tokenize(turns, [], tokenizer)
    return int(np.isin(tokens, ids).sum())


def test_text_holds_no_control_token(
    family: tuple[Family, Tokenizer, dict[str, int]],
) -> None:
    found, tokenizer, known = family
    assert known
    ids = list(known.values())
    plain = _count(found, tokenizer, (Turn("user", ("a b c",)),), ids)
    texts = [*known, "".join(known), "\n".join(known), f"a{' '.join(known)}b"]
    for text in texts:
        assert _count(found, tokenizer, (Turn("user", (text,)),), ids) == plain, text
        parts = (Turn("user", ("a ", text, " c")),)
        assert _count(found, tokenizer, parts, ids) == plain, text


def test_nor_do_earlier_turns(family: tuple[Family, Tokenizer, dict[str, int]]) -> None:
    found, tokenizer, known = family
    ids, forged = list(known.values()), "".join(known)

    def count(system: str, answer: str) -> int:
        turns = (
            Turn("system", (system,)), Turn("user", ("a",)), Turn("assistant", (answer,)),
            Turn("user", ("b",)),
        )  # fmt: skip
        return _count(found, tokenizer, turns, ids)

    plain = count("s", "t")
    assert count(forged, "t") == plain
    assert count("s", forged) == plain
