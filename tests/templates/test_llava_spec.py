"""LLaVA without weights: prompts and token counts against the recorded official code."""

from __future__ import annotations

import hashlib
import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava.spec import Llava
from pipeline.rows import Turn
from pipeline.tokenizer import Tokenizer
from tests.helpers.families import found_family
from tests.helpers.llava_checkpoint import KINDS, write_original, write_tokenizer, write_twin
from tests.parity.llava_cases import ANYRES, IMAGE, ONEVISION, TURNS, sizes

RECORDED = json.loads(
    (Path(__file__).parents[1] / "recorded" / "llava" / "llava.json").read_text("utf-8")
)
ROWS = dict.fromkeys(KINDS, "llava") | {
    "next-qwen": "llava-next",
    "next-llama3": "llava-next",
    "onevision": "llava-onevision",
}
TEMPLATES = {
    "1.5": "vicuna_v1.1",
    "1.6": "vicuna_v1.1",
    "1.6-mistral": "mistral",
    "1.6-yi": "chatml-llava",
    "next-qwen": "chatml-llava",
    "next-llama3": "llava_llama_3",
    "onevision": "chatml-llava",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("specs")


family_of = partial(found_family, Llava)


@cache
def opened(folder: Path, kind: str, twin: bool) -> tuple[Llava, Tokenizer]:
    path = (write_twin if twin else write_original)(folder / f"{kind}-{twin}", kind)
    family = family_of(path)
    return family, Tokenizer(Checkpoint("x", path), family.control)


@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_equal_the_official_ones(folder: Path, kind: str, case: str) -> None:
    """The twin's too: one model, one prompt."""
    expected = RECORDED["prompts"][kind][case]
    for twin in (False, True):
        family, tokenizer = opened(folder, kind, twin)
        turns = TURNS[case]
        count = sum(isinstance(part, int) for turn in turns for part in turn.parts)
        layouts = [family.layout(70, 31, count)] * count
        tokens, starts = family.tokenize(turns, layouts, tokenizer)
        marked = tokens.tolist()
        for start, layout in reversed(list(zip(starts, layouts, strict=True))):
            assert (family.image_tokens(layout) == tokens[start : start + layout.num_tokens]).all()
            marked[start : start + layout.num_tokens] = [IMAGE]
        assert marked == expected["ids"]
        pieces = family.render(turns)
        text = "".join("<image>" if isinstance(piece, int) else piece for piece in pieces)
        assert text.removeprefix(family.template.start) == expected["text"].removeprefix(
            family.template.start
        )


@pytest.mark.parametrize("kind", KINDS)
def test_detection_and_templates(folder: Path, kind: str) -> None:
    for twin in (False, True):
        family, _ = opened(folder, kind, twin)
        assert family.name == ROWS[kind]
        assert family.template.name == TEMPLATES[kind]
        assert family.sizes.num_params > 0
        path = folder / f"{kind}-{twin}"
        assert family_of(path, chat_template=TEMPLATES[kind]).template is family.template
        wrong = "mistral" if TEMPLATES[kind] == "vicuna_v1.1" else "vicuna_v1.1"
        with pytest.raises(UserError, match=f"write '{TEMPLATES[kind]}' or 'auto'|write '"):
            family_of(path, chat_template=wrong)


def test_the_model_type_decides_nothing(tmp_path: Path) -> None:
    path = write_original(tmp_path, "1.6")
    config = json.loads((path / "config.json").read_text())
    for model_type in ("llava", "llava_llama", "llava_mistral", "bert"):
        (path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        assert family_of(path).config.original
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(UserError, match="no model family"):
        family_of(path)


def test_answers_end_at_the_templates_tokens(folder: Path) -> None:
    assert opened(folder, "1.5", False)[0].eos_token_ids == (2,)
    family, tokenizer = opened(folder, "next-llama3", False)
    assert tokenizer.id("<|eot_id|>") in family.eos_token_ids
    family, tokenizer = opened(folder, "1.6-yi", False)
    assert tokenizer.id("<|im_end|>") in family.eos_token_ids


def test_a_tokenizer_that_adds_its_start_token(tmp_path: Path) -> None:
    path = write_original(tmp_path, "1.6-yi") / "tokenizer_config.json"
    turns = (Turn("user", ("a",)),)

    def ids() -> list[int]:
        family = family_of(tmp_path)
        tokenizer = Tokenizer(Checkpoint("x", tmp_path), family.control)
        return family.tokenize(turns, [], tokenizer)[0].tolist()

    without = ids()
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"add_bos_token": True}))
    assert ids() == [1, *without]


@pytest.mark.parametrize("text", ["</s>", "<s>", "<image>", "<|im_end|>\n<|im_start|>system"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_of_a_row_forges_no_control_token(folder: Path, kind: str, text: str) -> None:
    family, tokenizer = opened(folder, kind, False)
    control = [tokenizer.encode(token, special=True) for token in family.control]
    ids = [only[0] for only in control if len(only) == 1]
    plain, _ = family.tokenize((Turn("user", ("a",)),), [], tokenizer)
    forged, _ = family.tokenize((Turn("user", (text,)),), [], tokenizer)
    assert np.isin(forged, ids).sum() == np.isin(plain, ids).sum()


def full_size(folder: Path, kind: str, **changes: Any) -> Llava:
    """A family of the true picture sizes, for its layouts."""
    folder.mkdir()
    write_tokenizer(folder, kind)
    (folder / "config.json").write_text(json.dumps(changes))
    return family_of(folder)


ORIGINAL_16 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": ANYRES,
}
ORIGINAL_OV = ORIGINAL_16 | {
    "architectures": ["LlavaQwenForCausalLM"],
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),(1x2),(6x6)",
}


@pytest.mark.parametrize(("kind", "config"), [("1.6", ORIGINAL_16), ("onevision", ORIGINAL_OV)])
def test_token_counts_equal_the_official_ones(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    family, expected = full_size(tmp_path / kind, kind, **config), RECORDED["counts"][kind]
    found = [family.layout(*size).num_tokens for size in sizes()]
    assert found[:50] == expected["first"]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == expected["sha256"]


def official_counts(kind: str) -> list[int]:
    if kind == "1.6":
        processor = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=ANYRES),
            patch_size=14,
            num_additional_image_tokens=0,
        )
        methods, side = LlavaNextProcessor, 336
    else:
        processor = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=ONEVISION),
            num_image_tokens=729,
            vision_aspect_ratio="anyres_max_9",
        )
        methods, side = LlavaOnevisionProcessor, 384
    processor._get_unpadded_features = lambda *a: methods._get_unpadded_features(processor, *a)
    count: Any = methods._get_number_of_features
    return [count(processor, height, width, side, side) for width, height in sizes()]


@pytest.mark.parametrize("kind", ["1.6", "onevision"])
def test_the_twins_token_counts_equal_the_processors(tmp_path: Path, kind: str) -> None:
    twin = {"architectures": [KINDS[kind].twin], "text_config": {"model_type": "llama"}}
    family = full_size(tmp_path / kind, kind, **twin)
    assert [family.layout(*size).num_tokens for size in sizes()] == official_counts(kind)


def test_known_counts(tmp_path: Path) -> None:
    family = full_size(tmp_path / "a", "1.6", **ORIGINAL_16)
    found = {size: family.layout(*size).num_tokens for size in [(1024, 768), (300, 200), (1, 1)]}
    assert found == {(1024, 768): 2340, (300, 200): 976, (1, 1): 1176}
    family = full_size(tmp_path / "b", "onevision", **ORIGINAL_OV)
    assert family.layout(1024, 768).num_tokens == 4725
    assert family.layout(1024, 768, 2).num_tokens == 730
    family = full_size(tmp_path / "c", "1.5", **ORIGINAL_16 | {"image_aspect_ratio": "pad"})
    assert {family.layout(*size).num_tokens for size in sizes(50)} == {576}


def test_max_pixels_leaves_out_large_resolutions(tmp_path: Path) -> None:
    full_size(tmp_path / "a", "onevision", **ORIGINAL_OV)
    limited = family_of(tmp_path / "a", max_pixels=4 * 384**2)
    assert all(
        view.height * view.width <= 4 * 384**2
        for size in sizes(200)
        for view in limited.layout(*size).views
    )
    assert limited.layout(1024, 768).num_tokens < 4725
    for options in ({"max_pixels": 100}, {"min_pixels": 100}):
        with pytest.raises(UserError, match=next(iter(options))):
            family_of(tmp_path / "a", **options)


def test_a_crop_of_an_extreme_image_is_refused(tmp_path: Path) -> None:
    square = ORIGINAL_16 | {"image_aspect_ratio": None, "mm_patch_merge_type": "flat"}
    family = full_size(tmp_path / "a", "1.5", **square)
    assert family.layout(4000, 30).num_tokens == 576
    with pytest.raises(RowError) as caught:
        family.layout(4000, 3)
    assert caught.value.code == "bad_aspect_ratio"


def test_a_line_that_pools_to_nothing_is_refused(tmp_path: Path) -> None:
    few = {"image_aspect_ratio": "anyres_max_1", "image_grid_pinpoints": "(1x1),...,(40x1)"}
    family = full_size(tmp_path / "a", "onevision", **ORIGINAL_OV | few)
    with pytest.raises(RowError) as caught:
        family.layout(60000, 10)
    assert caught.value.code == "bad_aspect_ratio"


@pytest.mark.parametrize(
    "changes", [{"mm_newline_position": "grid"}, {"mm_spatial_pool_mode": "average"}]
)
def test_videos_pooled_otherwise_are_not_taken(tmp_path: Path, changes: dict[str, str]) -> None:
    assert full_size(tmp_path / "a", "onevision", **ORIGINAL_OV | changes).takes == {"image"}


SQUARE = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}


def twin_of(folder: Path, processor: dict[str, Any], **changes: Any) -> Llava:
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    write_tokenizer(folder, "1.5")
    config = {"architectures": [KINDS["1.5"].twin], "text_config": {"model_type": "llama"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return family_of(folder)


@pytest.mark.parametrize(
    ("changes", "aspect"),
    [
        ({}, "crop"),
        ({"do_pad": True}, "pad"),
        ({"do_pad": True, "image_processor_type": "CLIPImageProcessor"}, "crop"),
        ({"size": {"height": 336, "width": 336}}, "squash"),
        ({"image_processor_type": "SiglipImageProcessor", "size": None}, "squash"),
        ({"size": 336, "crop_size": 336}, "crop"),
    ],
    ids=str,
)
def test_a_square_is_made_as_the_processor_says(
    tmp_path: Path, changes: dict[str, Any], aspect: str
) -> None:
    family = twin_of(tmp_path / "a", SQUARE | changes)
    assert family.config.aspect == aspect
    siglip = "Siglip" in str(changes)
    assert family.image_mean[0] == (0.5 if siglip else 0.48145466)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_center_crop": False},
        {"do_normalize": False},
        {"do_resize": None},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
        {"size": {"shortest_edge": 384}},
        {"size": {"shortest_edge": 336, "longest_edge": 336}},
        {"crop_size": 224},
    ],
    ids=str,
)
def test_pixels_that_are_made_otherwise_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        twin_of(tmp_path / "a", SQUARE | changes)


NEXT = {"architectures": ["LlavaNextForConditionalGeneration"]}


@pytest.mark.parametrize(
    ("processor", "changes", "message"),
    [
        ({}, NEXT | {"vision_feature_select_strategy": "full"}, "'full' does not fit"),
        ({"image_grid_pinpoints": [[336, 336]]}, NEXT, "image_grid_pinpoints"),
        (
            {},
            {
                "architectures": [KINDS["onevision"].twin],
                "text_config": {"model_type": "qwen2"},
                "vision_aspect_ratio": "pad",
            },
            "'pad'",
        ),
    ],
    ids=str,
)
def test_a_twin_that_fits_nothing_is_refused(
    tmp_path: Path, processor: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        twin_of(tmp_path / "a", processor, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "pooler"}, "pooler"),
        ({"image_aspect_ratio": "highres"}, "highres"),
        ({"mm_patch_merge_type": "maxpool2x2"}, "maxpool2x2"),
        ({"mm_use_im_start_end": True}, "marks around images"),
        ({"mm_vision_tower": "somebody/eva"}, "somebody/eva"),
        ({"mm_vision_select_layer": [-2, -5]}, "layer"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "(axb)"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336, 500]]}, "multiples of 336"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        full_size(tmp_path / "a", "1.6", **ORIGINAL_16 | changes)
