"""LLaVA gives transformers' logits and greedy tokens, from the original layouts and the twins."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loading import load_model
from pipeline.models.registry import family_for
from pipeline.settings import ModelSettings
from tests.helpers.checkpoint_copies import set_tensor
from tests.helpers.llava_checkpoint import (
    KINDS,
    image_id,
    pinpoints,
    write_original,
    write_twin,
)
from tests.helpers.parity import (
    Part,
    Prompt,
    difference,
    make_prompt,
    open_found,
    our_logits,
    our_tokens,
    random_image,
    random_text,
)

TOLERANCE = 1e-4
TILED = [kind for kind in KINDS if kind != "1.5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def _folder(folders: Path, kind: str, twin: bool) -> Path:
    return (write_twin if twin else write_original)(folders / f"{kind}-{twin}", kind)


@cache
def _ours(folders: Path, kind: str, twin: bool = False) -> Model:
    return open_found(_folder(folders, kind, twin))


@cache
def _theirs(folders: Path, kind: str) -> Any:
    model, report = AutoModelForImageTextToText.from_pretrained(
        _folder(folders, kind, True), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    # NOTE: a tower's last norm and blocks that are not used.
    assert all("vision_tower" in name for name in report["unexpected_keys"])
    return model.eval()


def official_pixels(kind: str, images: tuple[np.ndarray, ...]) -> dict[str, torch.Tensor]:
    """The processor's tensors for one conversation with these images."""
    pictures = [Image.fromarray(image) for image in images]
    side = KINDS[kind].side
    edges = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kind == "1.5":
        return dict(LlavaImageProcessorPil(do_pad=True, **edges)(pictures, return_tensors="pt"))
    if kind == "onevision":
        half, size = [0.5] * 3, {"height": side, "width": side}
        processor: Any = LlavaOnevisionImageProcessorPil(
            size=size, image_mean=half, image_std=half, image_grid_pinpoints=pinpoints(kind)
        )
        return dict(processor([pictures], return_tensors="pt"))
    processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(kind), **edges)
    return dict(processor(pictures, return_tensors="pt"))


def _their_inputs(kind: str, prompt: Prompt) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(prompt.tokens).long()[None]
    tokens[0, torch.from_numpy(prompt.where)] = image_id(kind)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | (official_pixels(kind, prompt.images) if prompt.images else {})


def prompt_of(model: Model, parts: list[Part]) -> Prompt:
    count = sum(isinstance(part, np.ndarray) for part in parts)
    return make_prompt(model.family, parts, num_images=count)


PROMPTS: dict[str, list[Part]] = {
    "text only": [random_text(23)],
    "wide": [random_text(5), random_image(70, 31), random_text(9, 1)],
    "tall": [random_image(17, 43), random_text(6, 1)],
    "tiny, enlarged": [random_text(2), random_image(9, 7), random_text(3)],
    "very wide": [random_text(2), random_image(400, 7), random_text(3)],
    "large": [random_text(2), random_image(160, 120), random_text(3)],
    "square": [random_text(2), random_image(48, 48), random_text(3)],
    "several, text between": [
        random_text(4),
        random_image(50, 83, 1),
        random_text(3, 2),
        random_image(111, 37, 2),
        random_image(50, 83, 3),
        random_text(7, 3),
    ],
}


CASES = [(kind, name) for kind in KINDS for name in PROMPTS]
# Where language models differ and towers do not, one picture is enough.
ONE_PICTURE = ("1.6-mistral", "1.6-yi", "next-llama3")


@pytest.mark.parametrize(
    ("kind", "name"), [c for c in CASES if c[0] not in ONE_PICTURE or c[1] in ("wide", "text only")]
)
@torch.inference_mode()
def test_logits(folders: Path, kind: str, name: str) -> None:
    ours = _ours(folders, kind)
    prompt = prompt_of(ours, PROMPTS[name])
    theirs = _theirs(folders, kind)(**_their_inputs(kind, prompt)).logits[0]
    assert difference(our_logits(ours, prompt), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_greedy_tokens(folders: Path, kind: str) -> None:
    ours = _ours(folders, kind)
    prompt = prompt_of(ours, PROMPTS["several, text between"])
    ids = _theirs(folders, kind).generate(
        **_their_inputs(kind, prompt), max_new_tokens=12, do_sample=False, eos_token_id=-1
    )
    assert our_tokens(ours, prompt, 12) == ids[0, len(prompt.tokens) :].tolist()


@pytest.mark.parametrize("kind", TILED)
@torch.inference_mode()
def test_the_twin_gives_the_same_logits(folders: Path, kind: str) -> None:
    ours, twin = _ours(folders, kind), _ours(folders, kind, True)
    prompt = prompt_of(ours, PROMPTS["wide"])
    other = prompt_of(twin, PROMPTS["wide"])
    assert prompt.starts == other.starts
    assert torch.equal(our_logits(ours, prompt), our_logits(twin, other))


@torch.inference_mode()
def test_a_sliding_window(tmp_path: Path) -> None:
    """Mistral 0.1's, here of 16 tokens, shorter than an image's block."""
    for write, name in ((write_original, "original"), (write_twin, "twin")):
        path = write(tmp_path / name, "1.6-mistral") / "config.json"
        config = json.loads(path.read_text())
        config.get("text_config", config)["sliding_window"] = 16
        path.write_text(json.dumps(config))
    settings = ModelSettings(id=str(tmp_path / "original"))
    checkpoint = Checkpoint.open(settings)
    ours = load_model(checkpoint, family_for(checkpoint, settings), "cpu", torch.float32)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "twin").eval()
    prompt = prompt_of(ours, PROMPTS["wide"])
    inputs = _their_inputs("1.6-mistral", prompt)
    found, expected = our_logits(ours, prompt), theirs(**inputs).logits[0]
    assert difference(found, expected) < TOLERANCE
    assert our_tokens(ours, prompt, 6) == (
        theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)[
            0, len(prompt.tokens) :
        ].tolist()
    )


@torch.inference_mode()
def test_todays_names_of_transformers(folders: Path, tmp_path: Path) -> None:
    _theirs(folders, "onevision").save_pretrained(tmp_path)
    for file in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((_folder(folders, "onevision", True) / file).read_bytes())
    settings = ModelSettings(id=str(tmp_path))
    checkpoint = Checkpoint.open(settings)
    saved = load_model(checkpoint, family_for(checkpoint, settings), "cpu", torch.float32)
    prompt = prompt_of(saved, PROMPTS["wide"])
    assert torch.equal(our_logits(saved, prompt), our_logits(_ours(folders, "onevision"), prompt))


@torch.inference_mode()
def test_the_twin_of_1_5_crops_as_its_processor_says(folders: Path) -> None:
    twin = _ours(folders, "1.5", True)
    for name in ("wide", "tall", "tiny, enlarged", "square"):
        prompt = prompt_of(twin, PROMPTS[name])
        inputs = _their_inputs("1.5", prompt)
        folder = _folder(folders, "1.5", True)
        pictures = [Image.fromarray(image) for image in prompt.images]
        inputs |= LlavaImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
        theirs = _theirs(folders, "1.5")(**inputs).logits[0]
        assert difference(our_logits(twin, prompt), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", ["1.5", "1.6", "onevision"])
@torch.inference_mode()
def test_pixels_equal_the_processors(folders: Path, kind: str) -> None:
    """To the last bit: both round in the same places."""
    from pipeline.models.vision.vit import image_patches

    ours: Any = _ours(folders, kind)
    for size in ((70, 31), (17, 43), (9, 7), (400, 7), (160, 120), (48, 48)):
        image = random_image(*size)
        tiles = ours._tiles(torch.from_numpy(image), ours.family.layout(*size))
        expected = official_pixels(kind, (image,))["pixel_values"]
        side = KINDS[kind].side
        expected = expected.reshape(-1, 3, side, side)[: len(tiles)]
        patches = image_patches(tiles, side, ours.mean, ours.std, torch.float32)
        assert torch.equal(patches.view(expected.shape), expected)


@pytest.mark.parametrize("kind", ["1.5", "1.6", "onevision"])
@torch.inference_mode()
def test_a_batch_equals_its_images(folders: Path, kind: str) -> None:
    model = _ours(folders, kind)
    sizes = [(70, 31), (17, 43), (9, 7), (160, 120)]
    images = [torch.from_numpy(random_image(w, h, i)) for i, (w, h) in enumerate(sizes)]
    layouts = [model.family.layout(w, h) for w, h in sizes]
    together = model.encode_images(images, layouts)
    alone = [model.encode_images([i], [x]) for i, x in zip(images, layouts, strict=True)]
    assert together.shape == (sum(x.num_tokens for x in layouts), model.feature_size)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


CHANGES: dict[str, tuple[str, str, torch.Tensor | None]] = {
    "missing": (r"lacks .*image_newline", "model.image_newline", None),
    "missing in the tower": (
        r"lacks .*layers\.1\.mlp\.fc1\.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
        None,
    ),
    "extra": (r"no place for: 'model\.extra", "model.extra", (2,)),
    "misshapen": (
        r"'model\.mm_projector\.0\.weight' has shape",
        "model.mm_projector.0.weight",
        (3, 3),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: str) -> None:
    message, name, shape = CHANGES[change]
    folder = set_tensor(write_original(tmp_path, "1.6"), name, shape)
    with pytest.raises(UserError, match=message):
        open_found(folder)


@torch.inference_mode()
def test_model_and_tower_from_the_hub(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_original(tmp_path / "written", "1.5")
    repositories = {"some/llava": written, "some/clip-tiny": tmp_path / "tower"}
    (written / "clip-tiny").rename(tmp_path / "tower")
    config = json.loads((written / "config.json").read_text())
    config["mm_vision_tower"] = "some/clip-tiny"
    (written / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("pipeline.models.checkpoint._download", lambda name, *_: repositories[name])
    model = open_found("some/llava")
    prompt = prompt_of(model, PROMPTS["wide"])
    assert torch.equal(our_logits(model, prompt), our_logits(_ours(folders, "1.5"), prompt))


def test_a_twin_without_its_tower_is_named(tmp_path: Path) -> None:
    file = write_twin(tmp_path, "1.6") / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "position_embedding" not in n}, file)
    with pytest.raises(UserError, match="position_embedding"):
        open_found(tmp_path)


def test_a_tower_that_is_nowhere_is_named(tmp_path: Path) -> None:
    folder = write_original(tmp_path, "1.5")
    (folder / "clip-tiny" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="clip-tiny"):
        open_found(folder)


YARN = {"type": "yarn", "factor": None, "original_max_position_embeddings": 64}
ODD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a kind of attention for each layer": (
        "next-qwen",
        {},
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "biases that Mistral has none of": (
        "1.6-mistral",
        {},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "yarn by its lengths": ("1.6", {}, {"rope_scaling": YARN}),
    "two ropes": (
        "1.6",
        {},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "a SigLIP's first patch left out": (
        "onevision",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_feature_select_strategy": "default",
        },
        {},
    ),
}


@pytest.mark.parametrize("name", ODD)
@torch.inference_mode()
def test_an_odd_twin(tmp_path: Path, name: str) -> None:
    """What transformers' classes read in a config.json, and nobody's hub copy says."""
    kind, changes, text = ODD[name]
    path = write_twin(tmp_path, kind) / "config.json"
    config = json.loads(path.read_text()) | changes
    config["text_config"] |= text
    path.write_text(json.dumps(config))
    ours = open_found(tmp_path)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    prompt = prompt_of(ours, PROMPTS["wide"])
    inputs = _their_inputs(kind, prompt)
    if "architectures" in changes:
        inputs["pixel_values"] = inputs["pixel_values"][:, 0]
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert difference(our_logits(ours, prompt), theirs(**inputs).logits[0]) < TOLERANCE


@torch.inference_mode()
def test_a_projector_of_one_numbered_layer(tmp_path: Path) -> None:
    folder = write_original(tmp_path, "1.6")
    config = json.loads((folder / "config.json").read_text()) | {"mm_projector_type": "mlp1x_gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    for part in ("weight", "bias"):
        set_tensor(folder, f"model.mm_projector.2.{part}", None)
    assert len(open_found(folder).projector.layers) == 1
