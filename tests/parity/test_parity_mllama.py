"""Llama 3.2 Vision gives transformers' ids, pixels, logits and tokens; CPU, float32."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.engine.cross_cache import CrossCache
from pipeline.errors import RowError
from pipeline.models.base import DenseAttend, Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.mllama import spec
from pipeline.rows import Request, Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import PIXELS, TEXTS, Bench, outputs, questions
from tests.engine.test_out_of_memory import failing
from tests.engine.test_parity import ARRANGEMENTS
from tests.helpers.checkpoint_copies import save_twin
from tests.helpers.families import found_family
from tests.helpers.mllama_checkpoint import IDS, LAYERS, LENGTH, SIDE, TILES, write_mllama
from tests.helpers.parity import (
    Part,
    Prompt,
    difference,
    make_prompt,
    open_ours,
    random_image,
    random_text,
)

TOLERANCE = 1e-4
TURNS = {
    "text": (Turn("user", ("How many things?",)),),
    "text, system": (Turn("system", (" Be brief.\n",)), Turn("user", (" Why? ",))),
    "image first": (Turn("user", (0, "Describe this image.")),),
    "image last": (Turn("user", ("Describe: ", 0)),),
    "blank system": (Turn("system", (" ",)), Turn("user", (0, "Why?"))),
    "images between": (Turn("user", ("first\n", 0, "\nthen", 1, 2, " why? naïve 東京 ")),),
    "turns": (
        Turn("user", ("What is\n\nthis?", 0)),
        Turn("assistant", (" A red square.\n",)),
        Turn("user", (1, "And this?")),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The hub's layout, what transformers saves of it, and one whose last layer crosses."""
    root = tmp_path_factory.mktemp("mllama")
    original = write_mllama(root / "original")
    twin = save_twin(theirs(original), original, root / "twin")
    last = write_mllama(root / "last", cross=(1, LAYERS - 1))
    return {"original": original, "twin": twin, "last": last}


@cache
def theirs(folder: Path) -> Any:
    from transformers import MllamaForConditionalGeneration

    model, report = MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.generation_config = type(model.generation_config)()
    return model.eval()


@cache
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@cache
def processor(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.mllama.processing_mllama import MllamaProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = MllamaImageProcessorPil.from_pretrained(folder)
    return MllamaProcessor(images, tokenizer, tokenizer.chat_template)


family_of = partial(found_family, spec.Mllama)


def messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    def content(turn: Turn) -> Any:
        if turn.role == "system":
            return turn.parts[0]
        return [
            {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
            for part in turn.parts
        ]

    return [{"role": turn.role, "content": content(turn)} for turn in turns]


@pytest.mark.parametrize("name", TURNS)
def test_ids_are_the_processors(folders: dict[str, Path], name: str) -> None:
    folder, turns = folders["original"], TURNS[name]
    family = family_of(folder)
    count = sum(isinstance(part, int) for turn in turns for part in turn.parts)
    layouts = [family.layout(64, 48, count)] * count
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    text = processor(folder).apply_chat_template(messages(turns), add_generation_prompt=True)
    pictures = [Image.fromarray(random_image(64, 48, seed)) for seed in range(count)] or None
    found = processor(folder)(
        images=pictures, text=text, add_special_tokens=False, return_tensors="np"
    )
    assert tokens.tolist() == found["input_ids"][0].tolist()
    assert np.flatnonzero(tokens == IDS["<|image|>"]).tolist() == list(starts)


def test_a_system_text_beside_images_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RowError, match="no system text beside images"):
        family_of(folders["original"]).render([Turn("system", ("S",)), Turn("user", (0, "Q"))])


def test_canvases_are_the_processors(folders: dict[str, Path]) -> None:
    from transformers.models.mllama import image_processing_pil_mllama as official

    family = family_of(folders["original"])
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 2000, (1500, 2)).tolist(), *rng.integers(1, 120, (500, 2)).tolist()]
    for width, height in [*sizes, [1, 9000], [9000, 1], [2 * SIDE, SIDE], [3 * SIDE, SIDE]]:
        canvas = official.get_optimal_tiled_canvas.__wrapped__(height, width, TILES, SIDE)
        fitted = official.get_image_size_fit_to_canvas(height, width, *canvas, SIDE)
        layout = family.layout(width, height)
        (view,) = layout.views
        assert (view.height, view.width) == tuple(canvas)
        assert view.resized == tuple(fitted)
        tiles = canvas[0] * canvas[1] // SIDE**2
        assert layout.num_states == tiles * LENGTH
        assert layout.num_padding_states == (TILES - tiles) * LENGTH
        assert layout.num_tokens == 1


def pixels_of(model: Model, image: np.ndarray) -> tuple[torch.Tensor, int, int]:
    """What our tower is given: patches, arrangement, tiles."""
    given: list[Any] = []
    tower = model.tower
    model.tower = lambda *args: given.append(args) or tower(*args)
    model.tower.config = tower.config
    try:
        layout = model.family.layout(image.shape[1], image.shape[0])
        model.encode_images([torch.from_numpy(image)], [layout])
    finally:
        model.tower = tower
    patches, ids, tiles = given[0]
    return patches[0], int(ids[0]), tiles


def test_pixels_are_the_processors(folders: dict[str, Path]) -> None:
    """To 1e-6: the processor rescales and normalises in another order of roundings."""
    model, grid = ours(folders["original"]), SIDE // 14
    rng = np.random.default_rng(3)
    sizes = [*rng.integers(4, 300, (20, 2)).tolist(), [300, 4], [4, 300]]
    for seed, (width, height) in enumerate(sizes):
        image = random_image(width, height, seed)
        patches, arrangement, tiles = pixels_of(model, image)
        found = processor(folders["original"]).image_processor(
            [[Image.fromarray(image)]], return_tensors="pt"
        )
        made = patches.view(TILES, grid, grid, 3, 14, 14).permute(0, 3, 1, 4, 2, 5)
        made = made.reshape(TILES, 3, SIDE, SIDE)
        torch.testing.assert_close(made, found["pixel_values"][0, 0], atol=1e-6, rtol=0)
        assert arrangement == found["aspect_ratio_ids"][0, 0]
        assert tiles == found["aspect_ratio_mask"][0, 0].sum()


IMAGE_SIZES = [(112, 56), (60, 60), (200, 190), (40, 150)]  # 2, 4, 4 and 3 tiles


def _image(number: int) -> np.ndarray:
    return random_image(*IMAGE_SIZES[number], number)


PROMPTS: dict[str, list[Part]] = {
    "text": [random_text(30, vocabulary=300)],
    "one image": [random_text(5, vocabulary=300), _image(0), random_text(9, 1, 300)],
    "image first": [random_image(20, 30), random_text(70, 1, 300)],
    "image at the end": [random_text(9, 1, 300), _image(1)],
    "images": [
        random_text(4, vocabulary=300),
        _image(0),
        random_text(6, 2, 300),
        _image(1),
        _image(2),
        random_text(5, 3, 300),
        _image(3),
        random_text(7, 4, 300),
    ],
    "images at the end": [random_text(4, vocabulary=300), _image(3), _image(0)],
}


def inputs_of(folder: Path, tokens: np.ndarray, images: Any) -> dict[str, Any]:
    from transformers.models.mllama import processing_mllama as official

    ids = torch.from_numpy(tokens).long()[None]
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(images):
        pictures = [[Image.fromarray(image) for image in images]]
        found = processor(folder).image_processor(pictures, return_tensors="pt")
        sparse = official.get_cross_attention_token_mask(tokens.tolist(), IDS["<|image|>"])
        mask = official.convert_sparse_cross_attention_mask_to_dense(
            [sparse], found.pop("num_tiles"), TILES, len(tokens)
        )
        given |= dict(found) | {"cross_attention_mask": torch.from_numpy(mask)}
    return given


def our_hidden(model: Model, prompt: Prompt, last: torch.Tensor | None = None) -> torch.Tensor:
    """All tokens at once, plain attention beside a cache of image states."""
    cross = CrossCache(model, 4000, 1)
    placed = prompt.placed()
    states = cross.pool.take(placed) if placed else None
    pixels = [SimpleNamespace(image=torch.from_numpy(image)) for image in prompt.images]
    length = len(prompt.tokens)
    piece: Any = SimpleNamespace(
        images=list(zip(placed, pixels, strict=True)), states=states, start=0, stop=length,
        num_tokens=length, sequence=None if last is None else object(),
    )  # fmt: skip
    cross.fill([piece])
    x = model.embed(torch.from_numpy(prompt.tokens).long())
    attend = cross.prefill(DenseAttend(model.decoder.config), [piece], x)
    return model.decoder(x, torch.arange(length)[None], attend, last)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("layout", ["original", "twin", "last"])
@torch.inference_mode()
def test_logits(folders: dict[str, Path], layout: str, name: str) -> None:
    folder = folders[layout]
    model = ours(folder)
    prompt = make_prompt(model.family, PROMPTS[name])
    expected = theirs(folder)(**inputs_of(folder, prompt.tokens, prompt.images)).logits[0]
    found = model.decoder.logits(our_hidden(model, prompt))
    assert difference(found, expected) < TOLERANCE
    final = our_hidden(model, prompt, torch.tensor([len(prompt.tokens) - 1]))
    assert difference(model.decoder.logits(final)[0], expected[-1]) < TOLERANCE


def mllama_questions(bench: Bench) -> list[Request]:
    """The usual rows, and rows of several images with two long questions each."""
    made = questions(bench, rows=4, stop_token_ids=(-1,))
    for row, numbers in enumerate(((0, 3), (1, 2, 0))):
        pictures = [_image(number) for number in numbers]
        for number, text in enumerate((TEXTS[0] * 3, TEXTS[1] * 2)):
            name = f"p{number}"
            made.append(bench.request(50 + row, text, pictures, name, stop_token_ids=(-1,)))
    return made


@pytest.fixture(scope="module")
def truth(folders: dict[str, Path]) -> dict[Any, tuple[torch.Tensor, tuple[int, ...]]]:
    """First logits and greedy tokens of each question."""
    found, model = {}, theirs(folders["original"])
    for r in mllama_questions(Bench.open(folders["original"])):
        images = [PIXELS[i.image.digest] for i in r.images]
        inputs = inputs_of(folders["original"], r.tokens, images)
        out = model.generate(
            **inputs, max_new_tokens=r.sampling.max_new_tokens, do_sample=False,
            eos_token_id=-1, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found[r.key] = out.logits[0][0], tuple(out.sequences[0, r.num_tokens :].tolist())
    return found


@pytest.mark.parametrize("engine", [{}, *ARRANGEMENTS], ids=str)
@torch.inference_mode()
def test_the_engine_gives_the_same(
    folders: dict[str, Path], truth: dict[Any, Any], engine: dict[str, Any]
) -> None:
    bench = Bench.open(folders["original"], **engine)
    built, rows = bench.engine(), []
    logits = built.model.decoder.logits
    built.model.decoder.logits = lambda *args, **options: (
        rows.append(logits(*args, **options)) or rows[-1]
    )
    found = outputs(bench.run(mllama_questions(bench), built))
    assert found == {key: tokens for key, (_, tokens) in truth.items()}
    seen = torch.cat(rows)
    for first, _ in truth.values():
        nearest = (seen - first).abs().amax(1).argmin()
        assert difference(seen[nearest], first) < TOLERANCE
    pool = built.cross.pool.pool
    assert pool.num_free == pool.size


def test_sharing_needs_the_same_images(folders: dict[str, Path]) -> None:
    """Tokens before an image depend on it, so no prefix is shared; images of one row are."""
    bench = Bench.open(folders["original"])
    engine = bench.engine()
    bench.run(mllama_questions(bench), engine)
    assert engine.scheduler.prefix is None
    images = sum(len(r.images) for r in mllama_questions(bench))
    assert engine.stats.num_images < images


def test_few_states_at_once(folders: dict[str, Path], truth: dict[Any, Any]) -> None:
    """A small cache makes requests wait, and refuses what never fits."""
    bench = Bench.open(folders["original"])
    engine = bench.engine()
    small = CrossCache(engine.model, 2 * TILES * LENGTH, engine.slots.num_slots + 1)
    engine.cross = engine.decoder.cross = engine.starter.cross = small
    engine.scheduler.state_pool = small.pool
    found = bench.run(mllama_questions(bench), engine)
    for key, completion in found.items():
        if key.row == 51:
            assert completion.error is not None
            assert completion.error.code == "out_of_memory"
        else:
            assert completion.output_ids == truth[key][1]


@pytest.mark.parametrize("stage", ["encode_images", "embed"])
def test_answers_survive_out_of_memory(
    folders: dict[str, Path], truth: dict[Any, Any], stage: str
) -> None:
    bench = Bench.open(folders["original"])
    engine = bench.engine()
    found = getattr(engine.model, stage)
    setattr(engine.model, stage, failing(found, lambda number, _: number == 2))
    answers = outputs(bench.run(mllama_questions(bench), engine))
    assert answers == {key: tokens for key, (_, tokens) in truth.items()}
    assert engine.stats.num_out_of_memory == 1
    pool = engine.cross.pool.pool
    assert pool.num_free == pool.size


@torch.inference_mode()
def test_float8_is_close(folders: dict[str, Path]) -> None:
    """Cross-attention layers are quantised like the others."""
    model = open_ours(folders["original"], spec.build)
    prompt = make_prompt(model.family, PROMPTS["one image"])
    exact = model.decoder.logits(our_hidden(model, prompt))
    model = open_ours(folders["original"], spec.build, quantization="fp8")
    cross = model.decoder.layers[1]
    kinds = [type(x).__name__ for x in (cross.qkv.linear, cross.out.inner, cross.mlp.inner)]
    assert kinds == ["Fp8Linear", "Fp8Linear", "Fp8GatedMLP"]
    assert difference(model.decoder.logits(our_hidden(model, prompt)), exact) < 0.1


def test_a_repetition_penalty_knows_the_image_token(folders: dict[str, Path]) -> None:
    bench = Bench.open(folders["original"])
    requests = questions(bench, rows=2, repetition_penalty=1.3)
    assert all(c.error is None for c in bench.run(requests).values())
