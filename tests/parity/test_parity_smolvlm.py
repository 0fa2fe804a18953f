"""SmolVLM2 gives transformers' ids, token counts, pixels, logits and tokens. CPU, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration
from transformers.image_processing_backends import PilBackend
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.smolvlm import spec
from pipeline.models.registry import family_for
from pipeline.models.vision.vit import image_patches
from pipeline.rows import Request, Turn
from pipeline.settings import ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.engine.engine_bench import PIXELS, Bench, outputs, questions
from tests.helpers.checkpoint_copies import copy_with_tensor
from tests.helpers.label_run import label_run
from tests.helpers.parity import Prompt, difference, open_ours, our_logits, our_tokens, random_image
from tests.helpers.smolvlm_checkpoint import CHAT_TEMPLATE, SPECIAL, write_smolvlm
from tests.helpers.tiny_tokenizer import special_ids

Parts = tuple[str | tuple[int, int], ...]
CONVERSATIONS: dict[str, list[tuple[str, Parts]]] = {
    "text only": [("user", ("What is in the picture?",))],
    "one image": [("user", ((90, 70), "Describe this image."))],
    "text first": [("user", ("Look:", (300, 40), "What?"))],
    "square": [("user", ((56, 56), "What?"))],
    "tall": [("user", ((21, 400), "What?"))],
    "several": [
        ("system", ("Answer with one word.",)),
        ("user", ("A", (61, 45), "and", (45, 61), (1, 1))),
        ("assistant", ("Two.",)),
        ("user", ((200, 130), "\nAnd this?")),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    return open_ours(folder, spec.build)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    model, report = SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.generation_config = type(model.generation_config)()
    return model.eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return SmolVLMImageProcessorPil.from_pretrained(folder)


def our_prompt(name: str, folder: Path, family: Any) -> Prompt:
    turns, images = [], []
    for role, parts in CONVERSATIONS[name]:
        numbered: list[str | int] = []
        for part in parts:
            numbered.append(part if isinstance(part, str) else len(images))
            if not isinstance(part, str):
                images.append(random_image(*part, len(images)))
        turns.append(Turn(role, tuple(numbered)))
    layouts = tuple(family.layout(i.shape[1], i.shape[0]) for i in images)
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), family.control)
    tokens, starts = family.tokenize(turns, layouts, tokenizer)
    return Prompt(tokens, tuple(images), layouts, starts)


def their_inputs(name: str, folder: Path, processor: Any, prompt: Prompt) -> dict[str, Any]:
    """As SmolVLMProcessor does, which cannot be built without num2words."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    messages = [
        {
            "role": role,
            "content": [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                for p in parts
            ],
        }
        for role, parts in CONVERSATIONS[name]
    ]
    text = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    inputs: dict[str, Any] = {}
    if prompt.images:
        pictures = [Image.fromarray(i) for i in prompt.images]
        inputs = dict(processor([pictures], return_row_col_info=True, return_tensors="pt"))
        shapes = zip(inputs.pop("rows")[0], inputs.pop("cols")[0], strict=True)
        markers = "<fake_token_around_image>", "<image>", "<global-img>"
        for rows, columns in shapes:
            block = get_image_prompt_string(int(rows), int(columns), 4, *markers)
            text = text.replace("<image>", block.replace("<image>", "\0"), 1)
        text = text.replace("\0", "<image>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return inputs | {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.inference_mode()
def test_ids_logits_and_tokens(
    name: str, folder: Path, ours: Any, theirs: Any, processor: Any
) -> None:
    prompt = our_prompt(name, folder, ours.family)
    inputs = their_inputs(name, folder, processor, prompt)
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    expected = theirs(**inputs).logits[0]
    assert difference(our_logits(ours, prompt), expected) < 1e-4
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert our_tokens(ours, prompt, 8) == found[0, len(prompt.tokens) :].tolist()


@torch.inference_mode()
def test_pixels(ours: Any, processor: Any) -> None:
    """To 1e-6: both scale by 1/255 in float32, the processor after a product in float64."""
    for number, size in enumerate([(90, 70), (300, 40), (21, 400), (56, 56), (1, 1), (640, 480)]):
        image = random_image(*size, number)
        tiles = ours._tiles(torch.from_numpy(image), ours.family.layout(*size))
        found = image_patches(tiles, 56, ours.mean, ours.std, torch.float32)
        expected = processor([[Image.fromarray(image)]], return_tensors="pt")["pixel_values"][0]
        assert (found.view(expected.shape) - expected).abs().max() < 1e-6


class _NoPixels(PilBackend):
    """Resizes to the right shape only."""

    def resize(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


class _Shapes(SmolVLMImageProcessorPil, _NoPixels):
    """The processor's own rules on images without pixels."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        image = self.resize_for_vision_encoder(self.resize(image, self.size), self.tile)
        _, rows, columns = self.split_images(image, {"longest_edge": self.tile})
        return rows, columns

    tile = 56


def test_token_counts(ours: Any, folder: Path) -> None:
    official = _Shapes.from_pretrained(folder)
    rng = np.random.default_rng(3)
    for width, height in np.exp(rng.uniform(0, np.log(5000), (2000, 2))).astype(int).tolist():
        layout = ours.family.layout(width, height)
        assert layout.grid[1:] == official.grid(width, height)
        assert len(ours.family.image_tokens(layout)) == layout.num_tokens


@torch.inference_mode()
def test_the_engine_answers_as_transformers(folder: Path, theirs: Any, processor: Any) -> None:
    bench = Bench.open(folder)
    requests = questions(bench, rows=4)
    found = outputs(bench.run(requests))
    assert found == {r.key: _their_tokens(theirs, processor, r) for r in requests}


def _their_tokens(theirs: Any, processor: Any, request: Request) -> tuple[int, ...]:
    tokens = torch.from_numpy(request.tokens.astype(np.int64))[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if request.images:
        pictures = [Image.fromarray(PIXELS[i.image.digest]) for i in request.images]
        inputs |= dict(processor([pictures], return_tensors="pt"))
    stop = request.sampling.stop_token_ids[0]
    count = request.sampling.max_new_tokens
    out = theirs.generate(
        **inputs, do_sample=False, max_new_tokens=count, eos_token_id=stop, pad_token_id=stop
    )
    found = out[0, tokens.shape[1] :].tolist()
    return tuple(found[:-1] if found[-1] == stop else found)


def test_run(folder: Path, tmp_path: Path) -> None:
    rows = label_run(folder, tmp_path, [(64, 48), (640, 300), (31, 90)], "smolvlm")
    assert all(row["caption"] is not None and row["count"] is not None for row in rows)


def test_another_template_is_refused(folder: Path) -> None:
    settings = ModelSettings(id=str(folder), chat_template="qwen2-vl")
    with pytest.raises(UserError, match="'smolvlm'"):
        family_for(Checkpoint.open(settings), settings)


def test_text_cannot_forge_an_image(folder: Path, ours: Any) -> None:
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))), ours.family.control)
    turn = Turn("user", ("<image><row_1_col_1>",))
    tokens, _ = ours.family.tokenize([turn], [], tokenizer)
    ids = special_ids(SPECIAL)
    assert not {ids["<image>"], ids["<row_1_col_1>"]} & set(tokens.tolist())


def test_tied_head(tmp_path: Path, processor: Any) -> None:
    path = write_smolvlm(tmp_path, tied=True)
    model = open_ours(path, spec.build)
    prompt = our_prompt("one image", path, model.family)
    reference = SmolVLMForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    inputs = their_inputs("one image", path, processor, prompt)
    with torch.inference_mode():
        assert difference(our_logits(model, prompt), reference(**inputs).logits[0]) < 1e-4


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("model.connector.modality_projection.proj.weight", None, "modality_projection"),
        ("model.more", (2,), "'model.more'"),
        (
            "model.text_model.norm.weight",
            (3,),
            r"'model.text_model.norm.weight' has shape \(3,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, name: str, shape: Any, named: str
) -> None:
    broken = copy_with_tensor(folder, tmp_path / "broken", name, shape)
    with pytest.raises(UserError, match=named):
        open_ours(broken, spec.build)


def test_limits_of_pixels(folder: Path) -> None:
    def family(**limits: int) -> Any:
        settings = ModelSettings(id=str(folder), **limits)
        return family_for(Checkpoint.open(settings), settings)

    for most in (56**2, 20_000, 30_000, 10**9):
        for size in [(300, 300), (301, 17), (17, 301)]:
            layout = family(max_pixels=most).layout(*size)
            assert layout.height * layout.width <= most
    with pytest.raises(UserError, match="3136 or more"):
        family(max_pixels=3000)
    with pytest.raises(UserError, match="min_pixels"):
        family(min_pixels=100)
