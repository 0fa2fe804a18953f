"""The unfused path answers as transformers' `generate` does row by row, and fails by the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import RowError, UserError
from pipeline.feeder import END
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.generic import GenericEngine
from pipeline.models.registry import family_for
from pipeline.rows import (
    Completion,
    EncodedImage,
    Group,
    PlacedImage,
    Prefix,
    Request,
    RequestKey,
    SamplingParams,
    Turn,
)
from pipeline.settings import InputSettings, LabelSettings, ModelSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.generic_checkpoint import write_llava
from tests.helpers.parity import random_image

SIZES = [(80, 60), (56, 56), (200, 90), (31, 77)]
QUESTIONS = ["What is this?", "Describe the image in detail.", "Why?", "Read all text as JSON."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


def _settings(folder: Path, **model: Any) -> LabelSettings:
    return LabelSettings(
        model=ModelSettings(id=str(folder), **model), input=InputSettings(path="unused")
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> GenericEngine:
    settings = _settings(folder)
    checkpoint = Checkpoint.open(settings.model)
    family = family_for(checkpoint, settings.model)
    assert not family.fused
    return GenericEngine(checkpoint, family, settings, torch.device("cpu"))


class _Feed:
    """A feed of what is there already."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = list(items)
        self.released = 0

    def get(self, timeout: float | None) -> Any:
        return self.items.pop(0) if self.items else END

    def release(self) -> None:
        self.released += 1

    def fed(self, item: Any, images: Sequence[Any]) -> Any:
        return SimpleNamespace(item=item, images=tuple(images), release=self.release)


def _request(
    engine: GenericEngine,
    row: int,
    question: str,
    sizes: Sequence[tuple[int, int]],
    **sampling: Any,
) -> Request:
    family = engine.family
    turns = [Turn("user", (*range(len(sizes)), question))]
    layouts = [family.layout(*size) for size in sizes]
    tokens, starts = family.tokenize(turns, layouts, engine.tokenizer)
    images = tuple(
        PlacedImage(EncodedImage(bytes([row] * 16), *size, "", 0, 0), layout, start)
        for size, layout, start in zip(sizes, layouts, starts, strict=True)
    )
    positions, following = family.positions(tokens, images)
    params = SamplingParams(
        max_new_tokens=12, stop_token_ids=family.eos_token_ids, **{"seed": row, **sampling}
    )
    text = family.prompt_text(turns)
    key = RequestKey("s", row, "answer")
    return Request(key, tokens, images, positions, following, params, text=text)


def _requests(engine: GenericEngine, **sampling: Any) -> tuple[list[Request], list[np.ndarray]]:
    pairs = list(zip(QUESTIONS, SIZES, strict=True))
    requests = [_request(engine, i, q, [s], **sampling) for i, (q, s) in enumerate(pairs)]
    return requests, [random_image(*size, i) for i, size in enumerate(SIZES)]


def _run(engine: GenericEngine, requests: Sequence[Request], images: Any) -> dict[int, Completion]:
    feed = _Feed([])
    for request, image in zip(requests, images, strict=True):
        own = image if isinstance(image, list) else [image]
        length = 0
        feed.items.append(feed.fed(Group((request,), length, length), own))
    count = len(feed.items)
    found = {c.key.row: c for c in engine.run(feed)}  # type: ignore[arg-type]
    assert feed.released == count
    return found


def _generate(engine: GenericEngine, request: Request, image: np.ndarray | None) -> list[int]:
    """Ask transformers itself, one row at a time."""
    options = {} if image is None else {"images": [Image.fromarray(image)]}
    inputs = engine.processor(text=[request.text], return_tensors="pt", **options)
    out = engine.model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    stops = [i for i, token in enumerate(ids) if token in engine.family.eos_token_ids]
    return ids[: stops[0]] if stops else ids


def test_greedy_answers_are_those_of_transformers(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    found = _run(engine, requests, images)
    for request, image in zip(requests, images, strict=True):
        completion = found[request.key.row]
        assert list(completion.output_ids) == _generate(engine, request, image)
        assert completion.finish_reason in ("stop", "length")
        assert completion.num_prompt_tokens > 16
    assert len({c.output_ids for c in found.values()}) > 1


def test_rows_without_images(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    plain = _request(engine, 9, "Hello there", [])
    found = _run(engine, [requests[0], plain, requests[1]], [images[0], [], images[1]])
    assert list(found[9].output_ids) == _generate(engine, plain, None)
    assert sorted(found) == [0, 1, 9]


def test_several_images_of_a_row_keep_their_order(engine: GenericEngine) -> None:
    pictures = [random_image(56, 56, 1), random_image(90, 56, 2)]
    request = _request(engine, 0, "Compare.", [(56, 56), (90, 56)])
    one = _run(engine, [request], [pictures])[0].output_ids
    other = _run(engine, [request], [pictures[::-1]])[0].output_ids
    assert one != other


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.5},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 1.3},
    ],
)
def test_answers_do_not_depend_on_the_batch(
    engine: GenericEngine, sampling: dict[str, Any]
) -> None:
    requests, images = _requests(engine, **sampling)
    together = _run(engine, requests, images)
    for request, image in zip(requests, images, strict=True):
        row = request.key.row
        assert _run(engine, [request], [image])[row].output_ids == together[row].output_ids


def test_seeds_matter(engine: GenericEngine) -> None:
    requests, images = _requests(engine, temperature=2.0)
    again = replace(requests[0], sampling=replace(requests[0].sampling, seed=77))
    first = _run(engine, requests[:1], images[:1])[0].output_ids
    assert _run(engine, [again], images[:1])[0].output_ids != first


def test_rows_end_by_their_own_limits(engine: GenericEngine) -> None:
    requests, images = _requests(engine, ignore_eos=True)
    short = replace(requests[1], sampling=replace(requests[1].sampling, max_new_tokens=3))
    found = _run(engine, [requests[0], short], images[:2])
    assert [len(found[i].output_ids) for i in (0, 1)] == [12, 3]
    text = engine.tokenizer.decode(found[0].output_ids)
    stop = next(c for c in text[3:] if c.isalnum())
    stopping = replace(requests[0], sampling=replace(requests[0].sampling, stop=(stop,)))
    ended = _run(engine, [stopping], images[:1])[0]
    assert ended.finish_reason == "stop"
    assert len(ended.output_ids) < 12
    assert stop in engine.tokenizer.decode(ended.output_ids)


def test_a_schema_is_followed(engine: GenericEngine) -> None:
    import json

    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
    requests, images = _requests(engine)
    asked = replace(requests[0], schema=json.dumps(schema | {"additionalProperties": False}))
    asked = replace(asked, sampling=replace(asked.sampling, max_new_tokens=60))
    found = _run(engine, [asked, requests[1]], images[:2])
    assert json.loads(engine.tokenizer.decode(found[0].output_ids))["a"] in ("x", "yy")
    assert list(found[1].output_ids) == _generate(engine, requests[1], images[1])


def test_a_broken_image_fails_its_row_alone(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    broken = [images[0], RowError("truncated_image"), images[2]]
    found = _run(engine, requests[:3], broken)
    assert found[1].error is not None
    assert found[1].error.code == "truncated_image"
    assert found[0].error is None
    assert found[2].error is None


def test_a_prompt_that_the_processor_refuses_fails_alone(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    wrong = replace(requests[1], text="<|image_pad|><|image_pad|> two markers, one image")
    found = _run(engine, [requests[0], wrong, requests[2]], images[:3])
    assert found[1].error is not None
    assert found[0].error is None
    assert list(found[2].output_ids) == _generate(engine, requests[2], images[2])


def test_a_prompt_too_long_for_the_model(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    long = replace(requests[0], text=(requests[0].text or "") + "word " * 400)
    found = _run(engine, [long, requests[1]], images[:2])
    assert found[0].error is not None
    assert found[0].error.code == "prompt_too_long"
    assert found[1].error is None


def test_out_of_memory_halves_the_batch(
    engine: GenericEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.model.generate

    def generate(**inputs: Any) -> Any:
        texts = engine.processor.tokenizer.batch_decode(inputs["input_ids"])
        if len(texts) > 1 or "Why?" in texts[0]:
            raise torch.OutOfMemoryError("no room")
        return real(**inputs)

    monkeypatch.setattr(engine.model, "generate", generate)
    requests, images = _requests(engine)
    found = _run(engine, requests, images)
    codes = {row: c.error.code if c.error else None for row, c in found.items()}
    assert codes == {0: None, 1: None, 2: "out_of_memory", 3: None}


def test_numbers_gone_wrong_fail_the_row(
    engine: GenericEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = engine.model.get_output_embeddings().weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, float("nan")))
    requests, images = _requests(engine)
    found = _run(engine, requests[:1], images[:1])
    assert found[0].error is not None
    assert found[0].error.code == "numerical_error"


def test_a_group_gives_each_request_its_images(engine: GenericEngine) -> None:
    first = _request(engine, 0, "One?", [(80, 60)])
    second = replace(_request(engine, 1, "Two, and longer?", [(80, 60)]), images=first.images)
    image = random_image(80, 60)
    shared = first.images[0].layout.num_tokens
    feed = _Feed([])
    empty = Prefix(np.zeros(0, np.int32), (), np.zeros((1, 0), np.int32))
    feed.items = [feed.fed(empty, []), feed.fed(Group((first, second), 0, shared), [image])]
    found = {c.key.row: c for c in engine.run(feed)}  # type: ignore[arg-type]
    assert list(found[1].output_ids) == _generate(engine, second, image)


def test_draining_stops_admitting(engine: GenericEngine) -> None:
    requests, images = _requests(engine)
    feed = _Feed([])
    feed.items = [feed.fed(Group((r,), 0, 0), [i]) for r, i in zip(requests, images, strict=True)]
    engine.draining = True
    assert list(engine.run(feed)) == []  # type: ignore[arg-type]
    engine.draining = False


def test_quantization_is_refused(folder: Path) -> None:
    settings = _settings(folder, quantization="fp8")
    checkpoint = Checkpoint.open(settings.model)
    family = family_for(checkpoint, settings.model)
    with pytest.raises(UserError, match="fused families only"):
        GenericEngine(checkpoint, family, settings, torch.device("cpu"))


def test_a_broken_checkpoint_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    settings = _settings(broken)
    checkpoint = Checkpoint.open(settings.model)
    family = family_for(checkpoint, settings.model)
    with pytest.raises(UserError, match="transformers cannot load it") as caught:
        GenericEngine(checkpoint, family, settings, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_text_of_the_tokenizer_is_the_models(folder: Path) -> None:
    tokenizer = Tokenizer(Checkpoint.open(ModelSettings(id=str(folder))))
    assert tokenizer.decode(tokenizer.encode("What is this?")) == "What is this?"
