"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL give transformers' logits and greedy tokens, CPU, float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.models.base import Model
from pipeline.models.families.qwen_vl import spec
from tests.helpers.checkpoints import WRITERS
from tests.helpers.parity import (
    Part,
    Prompt,
    difference,
    make_prompt,
    open_ours,
    our_logits,
    our_tokens,
    random_image,
    random_text,
)
from tests.helpers.tiny_tokenizer import special_ids

START, END = special_ids()["<|vision_start|>"], special_ids()["<|vision_end|>"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def _written(folder: Path, kind: str, tied: bool) -> Path:
    return WRITERS[kind](folder / f"{kind}-{tied}", tied=tied)


@cache
def _ours(folder: Path, kind: str, tied: bool) -> Model:
    return open_ours(_written(folder, kind, tied), spec.build)


@cache
def _theirs(folder: Path, kind: str, tied: bool) -> Any:
    from transformers import AutoModelForImageTextToText

    path = _written(folder, kind, tied)
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def _their_inputs(folder: Path, kind: str, prompt: Prompt) -> dict[str, torch.Tensor]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = torch.from_numpy(prompt.tokens).long()[None]
    image_id = special_ids()["<|image_pad|>"]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == image_id).int(),
    }
    if prompt.images:
        processor = Qwen2VLImageProcessorPil.from_pretrained(_written(folder, kind, False))
        images = [Image.fromarray(image) for image in prompt.images]
        inputs |= processor(images=images, return_tensors="pt")
    return inputs


def _image(width: int, height: int, seed: int = 0) -> list[Part]:
    return [[START], random_image(width, height, seed), [END]]


PROMPTS: dict[str, list[Part]] = {
    "text only": [random_text(23)],
    "one image": [random_text(5), *_image(224, 168), random_text(9, 1)],
    "odd size": [random_text(3), *_image(301, 117), random_text(4, 1)],
    "tall": [*_image(61, 343), random_text(6, 1)],
    "tiny, enlarged": [random_text(2), *_image(9, 7), random_text(3)],
    "larger than max_pixels": [random_text(2), *_image(640, 480), random_text(3)],
    "several images, text between": [
        random_text(4),
        *_image(150, 250, 1),
        random_text(3, 2),
        *_image(333, 111, 2),
        *_image(150, 250, 3),
        random_text(7, 3),
    ],
    "window edge": [random_text(4), *_image(224, 224), *_image(112, 448), random_text(3)],
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_logits(folders: Path, kind: str, name: str) -> None:
    ours = _ours(folders, kind, False)
    prompt = make_prompt(ours.family, PROMPTS[name])
    theirs = _theirs(folders, kind, False)(**_their_inputs(folders, kind, prompt)).logits[0]
    assert difference(our_logits(ours, prompt), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_tied_head(folders: Path, kind: str) -> None:
    ours = _ours(folders, kind, True)
    prompt = make_prompt(ours.family, PROMPTS["odd size"])
    theirs = _theirs(folders, kind, True)(**_their_inputs(folders, kind, prompt)).logits[0]
    assert difference(our_logits(ours, prompt), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_greedy_tokens(folders: Path, kind: str) -> None:
    ours = _ours(folders, kind, False)
    prompt = make_prompt(ours.family, PROMPTS["several images, text between"])
    theirs = _theirs(folders, kind, False)
    theirs.model.rope_deltas = None
    inputs = _their_inputs(folders, kind, prompt)
    ids = theirs.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    expected = ids[0, len(prompt.tokens) :].tolist()
    assert len(expected) == 16
    assert our_tokens(ours, prompt, 16) == expected


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_last_rows_only(folders: Path, kind: str) -> None:
    from pipeline.models.base import DenseAttend
    from tests.helpers.parity import model_input

    ours = _ours(folders, kind, False)
    prompt = make_prompt(ours.family, PROMPTS["one image"])
    x, positions, _ = model_input(ours, prompt)
    decoder = ours.decoder
    last = torch.tensor([3, len(x) - 1])
    some = decoder(x, positions, DenseAttend(decoder.config), last)
    everything = decoder(x, positions, DenseAttend(decoder.config))
    torch.testing.assert_close(some, everything[last])
