"""DeepSeek-VL2 (tiny, small, base) gives the official ids, tiles, logits and tokens, in float32."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from pipeline.engine.memory import place_bytes
from pipeline.errors import RowError, UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.deepseek_vl2 import spec, tiles
from pipeline.models.vision.views import render_view, render_views
from pipeline.rows import Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.checkpoint_copies import set_keys, set_tensor
from tests.helpers.deepseek_vl2_checkpoint import (
    CANDIDATES,
    IDS,
    PATCH,
    SIDE,
    SPECIAL,
    write_deepseek_vl2,
)
from tests.helpers.families import found_family
from tests.helpers.label_run import label_run, start_run
from tests.helpers.parity import (
    Part,
    Prompt,
    difference,
    make_prompt,
    open_ours,
    our_logits,
    our_tokens,
    random_image,
)
from tests.helpers.recorded import recording

KINDS = ("tiny", "small", "base")
TOLERANCE = 1e-4
TURNS = {
    "text": (
        Turn("system", (" You count things.\n",)),
        Turn("user", ("How many things are there?",)),
    ),
    "image": (Turn("user", (0, "Describe this image.")),),
    "two images": (Turn("user", (0, 1, "Which one?")),),
    "three images": (Turn("user", ("a ", 0, "b ", 1, 2, " c")),),
    "grounding": (Turn("user", (0, "<|grounding|>Where is <|ref|>the house<|/ref|>?")),),
    "between": (Turn("user", ("first ", 0, "then ", 1, " say why ")),),
    "turns": (
        Turn("user", (0, "  What is it?\n")),
        Turn("assistant", (" A red square. ",)),
        Turn("user", ("And here? naïve 東京",)),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deepseek_vl2")
    return {kind: write_deepseek_vl2(root / kind, kind) for kind in KINDS}


@cache
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


family_of = partial(found_family, spec.DeepseekVL2)


def ids_of(folder: Path, turns: tuple[Turn, ...]) -> tuple[list[int], spec.DeepseekVL2]:
    family = family_of(folder)
    count = sum(isinstance(part, int) for turn in turns for part in turn.parts)
    layouts = [family.layout(64, 48, count)] * count
    checkpoint = Checkpoint.open(ModelSettings(id=str(folder)))
    tokenizer = Tokenizer(checkpoint, family.control, family.template.spoken)
    return family.tokenize(turns, layouts, tokenizer)[0].tolist(), family


@pytest.mark.parametrize("name", TURNS)
def test_ids_are_the_official_ones(folders: dict[str, Path], name: str) -> None:
    assert ids_of(folders["tiny"], TURNS[name])[0] == recording("deepseek_vl2").facts[name]


def test_answers_keep_what_they_point_at(folders: dict[str, Path]) -> None:
    family = family_of(folders["tiny"])
    checkpoint = Checkpoint.open(ModelSettings(id=str(folders["tiny"])))
    tokenizer = Tokenizer(checkpoint, family.control, family.template.spoken)
    said = "<|ref|>house<|/ref|><|det|>[[1, 2]]<|/det|>"
    assert tokenizer.encode(said)[0] == IDS["<|ref|>"]
    assert tokenizer.decode([*tokenizer.encode(said), IDS["<｜end▁of▁sentence｜>"]]) == said
    assert IDS["<|User|>"] not in tokenizer.encode("<|User|>: <image>")


def test_ids_where_the_tokenizer_lacks_the_tokens(tmp_path: Path) -> None:
    folder = write_deepseek_vl2(tmp_path, "tiny", SPECIAL[:2])
    ids, family = ids_of(folder, TURNS["image"])
    assert ids == recording("deepseek_vl2").facts["tokens added"]
    assert family.image_token_id in ids


def test_token_counts_are_the_official_ones(folders: dict[str, Path]) -> None:
    """2,000 sizes with the real candidates: the canvas and the number of tokens."""
    family = family_of(folders["tiny"])
    found = recording("deepseek_vl2").tensors["counts"]
    real = tuple((384 * w, 384 * h) for w in range(1, 10) for h in range(1, 10) if w * h <= 9)
    family.candidates, family.side, family.tile_rows = real, 384, 14
    rng = np.random.default_rng(11)
    sizes = np.exp(rng.uniform(0, np.log(8000), (len(found), 2))).astype(int)
    refused = 0
    for (width, height), (columns, rows, count) in zip(sizes.tolist(), found, strict=True):
        assert tiles.num_tokens(14, rows, columns) == count
        try:
            layout = family.layout(width, height)
        except RowError as error:
            assert error.code == "bad_aspect_ratio"
            assert max(width, height) / min(width, height) > 384  # nothing would be left of it
            refused += 1
            continue
        assert (layout.grid, layout.num_tokens) == ((1, rows, columns), count)
        assert family.layout(width, height, 3).num_tokens == 421
    assert refused < len(sizes) / 10


def test_limits_of_pixels(folders: dict[str, Path]) -> None:
    for most in (SIDE**2, 4 * SIDE**2 + 1, 10**9):
        family = family_of(folders["tiny"], max_pixels=most)
        layout = family.layout(900, 700)
        assert layout.height * layout.width <= most
    assert layout.grid[1] * layout.grid[2] > 4
    with pytest.raises(UserError, match="2304 or more"):
        family_of(folders["tiny"], max_pixels=SIDE**2 - 1)
    with pytest.raises(UserError, match="min_pixels"):
        family_of(folders["tiny"], min_pixels=100)


def test_known_sizes(folders: dict[str, Path]) -> None:
    family = family_of(folders["tiny"])
    real = tuple((384 * w, 384 * h) for w in range(1, 10) for h in range(1, 10) if w * h <= 9)
    family.candidates, family.side, family.tile_rows = real, 384, 14
    counts = {(1024, 768): 1415, (768, 1024): 1429, (640, 480): 1023, (1000, 1000): 2017}
    for size, count in counts.items():
        assert family.layout(*size, 2).num_tokens == count


def test_pixels_are_the_official_ones(folders: dict[str, Path]) -> None:
    """To the bit, before they are normalised."""
    model, family = ours(folders["tiny"]), family_of(folders["tiny"])
    for number, (width, height) in enumerate([(64, 48), (33, 90), (150, 40), (7, 5)]):
        image = torch.from_numpy(random_image(width, height, number))
        views = render_views(image, family.layout(width, height))
        made = torch.cat([model._tiles(view) for view in views])
        expected = recording("deepseek_vl2").tensors[f"levels.{number}"]
        np.testing.assert_array_equal(made.numpy(), expected.transpose(0, 2, 3, 1))


def test_views_equal_pillows_pad() -> None:
    rng = np.random.default_rng(5)
    for seed, (width, height) in enumerate(rng.integers(2, 150, (60, 2)).tolist()):
        image = random_image(width, height, seed)
        canvas = CANDIDATES[seed % len(CANDIDATES)]
        grey = (127, 127, 127)
        expected = ImageOps.pad(Image.fromarray(image), tuple(canvas), color=grey)
        view = tiles.padded_view(width, height, (canvas[0], canvas[1]), grey)
        made = render_view(torch.from_numpy(image), view).numpy()
        np.testing.assert_array_equal(made, np.asarray(expected))


def official_prompt(model: Model) -> Prompt:
    """The recorded prompt "between" with its two pictures."""
    ids, marker = recording("deepseek_vl2").facts["between"], IDS["<image>"]
    pictures = [random_image(64, 48, 0), random_image(33, 90, 1)]
    parts: list[Part] = []
    for piece in ids:
        if piece != marker:
            parts.append([piece])
        elif not parts or isinstance(parts[-1], list):
            parts.append(pictures.pop(0))
    return make_prompt(model.family, parts)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_and_tokens_are_the_official_ones(folders: dict[str, Path], kind: str) -> None:
    model, recorded = ours(folders[kind]), recording("deepseek_vl2").tensors
    prompt = official_prompt(model)
    expected = torch.from_numpy(recorded[f"{kind}.logits"])
    assert difference(our_logits(model, prompt)[-len(expected) :], expected) < TOLERANCE
    tokens = recorded[f"{kind}.tokens"].tolist()
    assert our_tokens(model, prompt, len(tokens)) == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_engine_gives_the_official_tokens(folders: dict[str, Path], kind: str) -> None:
    bench = Bench.open(folders[kind])
    tokens = recording("deepseek_vl2").tensors[f"{kind}.tokens"].tolist()
    pictures = [random_image(64, 48, 0), random_image(33, 90, 1)]
    request = bench.request_of(0, TURNS["between"], pictures, max_new_tokens=len(tokens))
    assert request.tokens.tolist() == official_prompt(ours(folders[kind])).tokens.tolist()
    (found,) = outputs(bench.run([request])).values()
    stop = IDS["<｜end▁of▁sentence｜>"]
    assert list(found) == (tokens[: tokens.index(stop)] if stop in tokens else tokens)


@pytest.mark.parametrize("kind", ["tiny", "base"])
@pytest.mark.parametrize(
    "engine",
    [{"decode_slots": 1}, {"share_images": False}, {"share_prefix": False, "overlap": False}],
    ids=str,
)
def test_arrangements_give_the_same_tokens(
    folders: dict[str, Path], kind: str, engine: dict[str, Any]
) -> None:
    plain, other = Bench.open(folders[kind]), Bench.open(folders[kind], **engine)
    assert outputs(other.run(questions(other))) == outputs(plain.run(questions(plain)))


def test_one_picture_alone_and_among_three(folders: dict[str, Path]) -> None:
    """Tiles depend on how many pictures a conversation has, so the two must share nothing."""
    found = []
    for share in (True, False):
        bench = Bench.open(folders["small"], share_images=share, share_prefix=share)
        one, *others = (random_image(90, 60, seed) for seed in range(3))
        requests = [
            bench.request(row, "Describe this.", pictures, f"p{number}")
            for row in range(3)
            for number, pictures in enumerate(([one], [one, *others], [one, others[0]]))
        ]
        assert requests[0].images[0].layout != requests[1].images[0].layout
        assert requests[0].images[0].layout == requests[2].images[0].layout
        found.append(outputs(bench.run(requests)))
    assert found[0] == found[1]


def test_the_cache_holds_one_row_a_token(folders: dict[str, Path]) -> None:
    engine = Bench.open(folders["base"]).engine()
    cache = engine.cache
    assert place_bytes(engine.model) == 3 * (32 + 8) * 4
    assert cache.data.shape[1:3] == (1, 1)
    assert cache.data.shape[-1] == 32 + 8
    assert family_of(folders["base"]).sizes.kv_values_per_token == 3 * (32 + 8)
    assert Bench.open(folders["tiny"]).engine().cache.data.shape[1:3] == (2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_detection(folders: dict[str, Path], kind: str) -> None:
    for name in ("auto", "deepseek-vl2"):
        family = family_of(folders[kind], chat_template=name)
        assert family.eos_token_ids == (IDS["<｜end▁of▁sentence｜>"],)
        assert family.side == SIDE
        assert 0 < family.sizes.active_params < family.sizes.decoder_params
    with pytest.raises(UserError, match="write 'deepseek-vl2' or 'auto'"):
        family_of(folders[kind], chat_template="qwen2-vl")


def test_other_checkpoints_of_the_model_type(folders: dict[str, Path], tmp_path: Path) -> None:
    config = Checkpoint.open(ModelSettings(id=str(folders["tiny"]))).config
    ocr = config | {"projector_config": {"projector_type": "linear"}}
    assert spec.matches(config)
    assert not spec.matches(ocr)
    write_deepseek_vl2(tmp_path, "tiny", tile_tag="1D")
    with pytest.raises(UserError, match="tile_tag"):
        family_of(tmp_path)


def test_parameters_are_counted(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        decoder = ours(folders[kind]).decoder
        tensors = load_file(folders[kind] / "model-00001-of-00002.safetensors")
        tensors |= load_file(folders[kind] / "model-00002-of-00002.safetensors")
        held = sum(
            tensor.size
            for name, tensor in tensors.items()
            if ".layers." in name and tensor.ndim == 2 and name.startswith("language.")
        )
        assert family_of(folders[kind]).sizes.decoder_params == held
        assert decoder.config.num_layers == 3


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("view_seperator", None, r"lacks the tensor 'view_seperator'"),
        (
            "language.model.layers.1.mlp.experts.3.up_proj.weight",
            (40, 63),
            r"experts.3.up_proj.weight' has shape \(40, 63\)",
        ),
        ("language.model.layers.1.mlp.experts.8.up_proj.weight", (40, 64), "no place for"),
    ],
)
def test_wrong_tensors(tmp_path: Path, name: str, shape: Any, message: str) -> None:
    folder = set_tensor(write_deepseek_vl2(tmp_path, "base"), name, shape)
    with pytest.raises(UserError, match=message):
        open_ours(folder, spec.build)


def test_run(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = label_run(folders["base"], tmp_path, [(64, 48), (30, 90), (50, 50), (900, 1)])
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "failed"]
    assert rows[0]["caption"] is not None


def test_run_with_a_wrong_template(folders: dict[str, Path], tmp_path: Path) -> None:
    ended = start_run(folders["tiny"], tmp_path, [(8, 8)], template="janus-pro")
    assert ended.returncode == 2
    assert "deepseek-vl2" in ended.stderr


def test_pixels_that_are_not_normalised(tmp_path: Path) -> None:
    folder = write_deepseek_vl2(tmp_path, "tiny")
    set_keys(folder, "processor_config.json", normalize=False, image_mean=[0.4, 0.5, 0.6])
    family = family_of(folder)
    assert (family.image_mean, family.image_std) == ((0.0,) * 3, (1.0,) * 3)
    assert family.background == (102, 127, 153)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": PATCH + 2}, "patches do not fit"),
        ({"downsample_ratio": 3}, "patches do not fit"),
        ({"sft_format": "plain"}, "sft_format"),
        ({"candidate_resolutions": [[SIDE, SIDE], [SIDE + 14, SIDE]]}, "whole tiles of 48"),
    ],
)
def test_processors_that_do_not_fit(tmp_path: Path, changes: Any, message: str) -> None:
    set_keys(write_deepseek_vl2(tmp_path, "tiny"), "processor_config.json", **changes)
    with pytest.raises(UserError, match=message):
        family_of(tmp_path)
