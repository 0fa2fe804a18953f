"""Pixtral gives transformers' logits and greedy tokens, from its layout and from Mistral's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.models.families.pixtral import spec
from tests.engine.engine_bench import PIXELS, Bench, outputs, questions
from tests.helpers.checkpoint_copies import set_tensor
from tests.helpers.label_run import label_run, start_run
from tests.helpers.parity import (
    Part,
    difference,
    make_prompt,
    open_ours,
    our_logits,
    our_tokens,
    random_image,
    random_text,
)
from tests.helpers.pixtral_checkpoint import LONGEST, PATCH, write_mistral, write_twin

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("pixtral")


@cache
def _folder(folders: Path, layout: str, large: bool = False) -> Path:
    write = write_mistral if layout == "mistral" else write_twin
    return write(folders / f"{layout}-{large}", large=large)


@cache
def _ours(folders: Path, layout: str, large: bool = False) -> Model:
    return open_ours(_folder(folders, layout, large), spec.build)


@cache
def _theirs(folders: Path, large: bool = False) -> Any:
    model, report = AutoModelForImageTextToText.from_pretrained(
        _folder(folders, "twin", large), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def _their_inputs(folders: Path, tokens: np.ndarray, images: Any) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(images):
        processor = PixtralImageProcessorPil.from_pretrained(_folder(folders, "twin"))
        pictures = [Image.fromarray(image) for image in images]
        inputs |= dict(processor(pictures, return_tensors="pt"))
    return inputs


def words(length: int, seed: int = 0) -> list[int]:
    """Ids of ordinary tokens."""
    return [40 + i for i in random_text(length, seed)]


PROMPTS: dict[str, list[Part]] = {
    "text only": [words(23)],
    "one image": [words(5), random_image(40, 24), words(9, 1)],
    "odd size": [words(3), random_image(37, 21), words(4, 1)],
    "one patch": [words(2), random_image(3, 2), words(3)],
    "large": [words(2), random_image(200, 130), words(3)],
    "several, text between": [
        words(4),
        random_image(50, 83, 1),
        words(3, 2),
        random_image(41, 17, 2),
        random_image(50, 83, 3),
        words(7, 3),
    ],
}


@pytest.mark.parametrize("name", PROMPTS)
@torch.inference_mode()
def test_logits(folders: Path, name: str) -> None:
    ours = _ours(folders, "twin")
    prompt = make_prompt(ours.family, PROMPTS[name])
    inputs = _their_inputs(folders, prompt.tokens, prompt.images)
    assert difference(our_logits(ours, prompt), _theirs(folders)(**inputs).logits[0]) < TOLERANCE


def whole_patches(parts: list[Part]) -> list[Part]:
    """The same prompt with images that no layout resizes."""
    sizes = iter([(40, 24), (8, 48), (64, 64)])
    return [p if isinstance(p, list) else random_image(*next(sizes)) for p in parts]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["text only", "one image", "several, text between"])
@torch.inference_mode()
def test_mistrals_layout_is_the_same_model(folders: Path, name: str, large: bool) -> None:
    ours = _ours(folders, "mistral", large)
    prompt = make_prompt(ours.family, whole_patches(PROMPTS[name]))
    inputs = _their_inputs(folders, prompt.tokens, prompt.images)
    theirs = _theirs(folders, large)(**inputs).logits[0]
    assert difference(our_logits(ours, prompt), theirs) < TOLERANCE
    twin = _ours(folders, "twin", large)
    again = make_prompt(twin.family, whole_patches(PROMPTS[name]))
    assert np.array_equal(prompt.tokens, again.tokens)


@torch.inference_mode()
def test_greedy_tokens(folders: Path) -> None:
    ours = _ours(folders, "twin")
    prompt = make_prompt(ours.family, PROMPTS["several, text between"])
    inputs = _their_inputs(folders, prompt.tokens, prompt.images)
    ids = _theirs(folders).generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert our_tokens(ours, prompt, 12) == ids[0, len(prompt.tokens) :].tolist()


@pytest.mark.parametrize("engine", [{}, {"decode_slots": 1, "share_images": False}], ids=str)
def test_the_engine_gives_transformers_tokens(folders: Path, engine: dict[str, Any]) -> None:
    bench = Bench.open(_folder(folders, "twin"), **engine)
    requests = questions(bench, rows=3, stop_token_ids=(-1,), max_new_tokens=8)
    expected = {}
    for r in requests:
        images = [PIXELS[i.image.digest] for i in r.images]
        inputs = _their_inputs(folders, r.tokens, images)
        out = _theirs(folders).generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1
        )
        expected[r.key] = tuple(out[0, len(r.tokens) :].tolist())
    assert outputs(bench.run(requests)) == expected


@torch.inference_mode()
def test_pixels_equal_the_processors(folders: Path) -> None:
    """To the last bit in transformers' layout."""
    ours: Any = _ours(folders, "twin")
    processor = PixtralImageProcessorPil.from_pretrained(_folder(folders, "twin"))
    for size in ((40, 24), (37, 21), (3, 2), (200, 130), (64, 65)):
        image = random_image(*size)
        layout = ours.family.layout(*size)
        found = ours._patches(torch.from_numpy(image), layout)
        expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
        cut = expected.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
        assert torch.equal(found, cut.reshape(found.shape))


@torch.inference_mode()
def test_a_batch_equals_its_images(folders: Path) -> None:
    model = _ours(folders, "mistral")
    sizes = [(70, 31), (17, 43), (9, 7), (160, 120), (70, 31)]
    images = [torch.from_numpy(random_image(w, h, i)) for i, (w, h) in enumerate(sizes)]
    layouts = [model.family.layout(w, h) for w, h in sizes]
    together = model.encode_images(images, layouts)
    alone = [model.encode_images([i], [x]) for i, x in zip(images, layouts, strict=True)]
    assert together.shape == (sum(x.num_tokens for x in layouts), model.feature_size)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_no_side_is_longer_than_it_may_be(folders: Path) -> None:
    layout = _ours(folders, "twin").family.layout(5000, 400)
    assert (layout.width, layout.height) == (LONGEST, 8)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vision_encoder.ln_pre.weight", None, "vision_tower.ln_pre.weight"),
        ("layers.1.attention.wk.weight", (3, 3), "layers.1.attention.wk.weight"),
        ("layers.7.attention_norm.weight", (3,), "layers.7.attention_norm.weight"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, name: str, shape: Any, message: str) -> None:
    set_tensor(write_mistral(tmp_path), name, shape)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        open_ours(tmp_path, spec.build)


@pytest.mark.parametrize("layout", ["mistral", "twin"])
def test_run(folders: Path, tmp_path: Path, layout: str) -> None:
    folder = _folder(folders, layout)
    rows = label_run(folder, tmp_path, [(64, 48), (30, 90), (9, 9)], "mistral")
    assert all(row["status"] == "ok" for row in rows)


def test_a_wrong_template_is_refused(folders: Path, tmp_path: Path) -> None:
    refused = start_run(_folder(folders, "mistral"), tmp_path, [(64, 48)], "vicuna_v1.1")
    assert refused.returncode == 2
    assert "'mistral'" in refused.stderr
