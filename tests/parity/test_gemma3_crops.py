"""Gemma's pan and scan, where a job asks for it: ids, crops and logits are transformers'."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.gemma3 import spec
from pipeline.models.registry import family_for
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import Bench, outputs
from tests.helpers.checkpoints import write_qwen2_vl
from tests.helpers.gemma_checkpoint import IDS, SOFT, TOKENS, write_gemma3
from tests.helpers.parity import Prompt, difference, open_ours, our_logits, our_tokens, random_image
from tests.parity.test_parity_gemma3 import TOLERANCE, family_of, messages, processor, theirs

SIZES = [(900, 300), (290, 264), (260, 1400), (520, 200)]  # 3 crops, none, 4, none: too small
TURNS = {
    "alone": (Turn("user", (0, "Describe this image.")),),
    "last": (Turn("system", (" Be brief. ",)), Turn("user", (" What is this? ", 2))),
    "without crops": (Turn("user", (1, "or", 3, "?")),),
    "several": (
        Turn("user", ("first\n", 1, "then ", 0, 2)),
        Turn("assistant", (" Two. ",)),
        Turn("user", (3, "And this?")),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("crops") / "scan")


@cache
def open_with_crops(folder: Path) -> Model:
    model = open_ours(folder, spec.build)
    model.family.crops = family_of(folder, pan_and_scan=True).crops
    return model


def make(folder: Path, turns: tuple[Turn, ...]) -> tuple[Prompt, list[Image.Image]]:
    """Our prompt of `turns`, whose numbers are of `SIZES`, and its pictures in their order."""
    family = family_of(folder, pan_and_scan=True)
    layouts = [family.layout(*size) for size in SIZES]
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    used = [part for turn in turns for part in turn.parts if isinstance(part, int)]
    images = [random_image(*SIZES[number], number) for number in used]
    prompt = Prompt(tokens, tuple(images), tuple(layouts[n] for n in used), starts)
    return prompt, [Image.fromarray(image) for image in images]


@pytest.mark.parametrize("name", TURNS)
@torch.inference_mode()
def test_ids_and_logits(folder: Path, name: str) -> None:
    prompt, pictures = make(folder, TURNS[name])
    text = processor(folder).apply_chat_template(messages(TURNS[name]), add_generation_prompt=True)
    found = processor(folder)(
        images=pictures, text=text, add_special_tokens=False, do_pan_and_scan=True,
        return_tensors="pt",
    )  # fmt: skip
    assert prompt.tokens.tolist() == found["input_ids"][0].tolist()
    count = sum(len(layout.views) for layout in prompt.layouts)
    assert (prompt.tokens == IDS[SOFT]).sum() == count * TOKENS
    for layout, start in zip(prompt.layouts, prompt.starts, strict=True):
        block = prompt.tokens[start : start + layout.num_tokens]
        assert np.array_equal(block, family_of(folder, pan_and_scan=True).image_tokens(layout))
    expected = theirs(folder)(**found).logits[0]
    assert difference(our_logits(open_with_crops(folder), prompt), expected) < TOLERANCE


def test_crops_are_the_processors(folder: Path) -> None:
    rule = family_of(folder, pan_and_scan=True).crops
    assert rule is not None
    official = processor(folder).image_processor.pan_and_scan
    for width, height in np.random.default_rng(0).integers(1, 2500, (2000, 2)).tolist():
        shape, numbers = (1, height, width), (rule.min_side, rule.max_crops, rule.min_ratio)
        across = official(np.broadcast_to(np.arange(width), shape), *numbers)
        down = official(np.broadcast_to(np.arange(height)[:, None], shape), *numbers)
        edges = [
            (x[0, 0, 0], y[0, 0, 0], x[0, -1, -1] + 1, y[0, -1, -1] + 1)
            for x, y in zip(across, down, strict=True)
        ]
        assert rule.boxes(width, height) == edges


@torch.inference_mode()
def test_the_engine_gives_the_same_tokens(folder: Path) -> None:
    bench = Bench.open(folder)
    bench.family.crops = family_of(folder, pan_and_scan=True).crops
    pictures = [random_image(*SIZES[0], 0), random_image(*SIZES[1], 1)]
    requests = [
        bench.request(0, text, pictures, f"p{i}", stop_token_ids=(-1,))
        for i, text in enumerate(("Why?", "How many birds?"))
    ]
    found = outputs(bench.run(requests))
    model = open_with_crops(folder)
    for r in requests:
        layouts = tuple(i.layout for i in r.images)
        prompt = Prompt(r.tokens, tuple(pictures), layouts, tuple(i.start for i in r.images))
        assert list(found[r.key]) == our_tokens(model, prompt, 12)


def test_other_families_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pan_and_scan"):
        settings = ModelSettings(id=str(write_qwen2_vl(tmp_path)), pan_and_scan=True)
        family_for(Checkpoint.open(settings), settings)


def test_the_checkpoints_own_settings_count(tmp_path: Path) -> None:
    """A preprocessor_config.json that asks for crops gets them, of its own sizes."""
    path = write_gemma3(tmp_path) / "preprocessor_config.json"
    own = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 100,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 2.0,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    family = family_of(tmp_path)
    for size in [*SIZES, (400, 210), (1000, 100), (100, 210)]:
        pictures = processor(tmp_path).image_processor(images=[random_image(*size)])
        assert len(family.layout(*size).views) == len(pictures["pixel_values"]), size
