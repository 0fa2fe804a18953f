"""From rows to requests: sampling, seeds, schemas, limits, and every error a row can meet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.prepare import Preparer, Unstored, sampling_params
from pipeline.rows import Answer, ImageRef, Request, Row
from pipeline.settings import GenerationSettings, LabelSettings, PromptSettings
from pipeline.tokenizer import Tokenizer
from tests.helpers.checkpoints import write_qwen2_5_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    write_qwen2_5_vl(folder)
    return folder


def make(folder: Path, **keys: Any) -> Preparer:
    keys.setdefault("prompts", {"caption": "Describe.", "why": "Why {x}?"})
    keys["input"] = {"path": "none", "max_images": 3} | keys.get("input", {})
    settings = LabelSettings(model={"id": str(folder)}, **keys)
    checkpoint = Checkpoint.open(settings.model)
    family = family_for(checkpoint, settings.model)
    return Preparer(settings, family, Tokenizer(checkpoint), Unstored())


def png(width: int = 60, height: int = 40) -> ImageRef:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, 3, 4)).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def row(*images: ImageRef, index: int = 5, **keys: Any) -> Row:
    columns = keys.pop("columns", {"x": "not"})
    return Row(f"id{index}", index, columns, images, **keys)


def prepared(preparer: Preparer, of: Row, **keys: Any) -> list[Request]:
    out = list(preparer.prepare("shard", of, **keys))
    assert all(isinstance(item, Request) for item in out), out
    return [item for item in out if isinstance(item, Request)]


def codes(preparer: Preparer, of: Row) -> dict[str, str | None]:
    out = list(preparer.prepare("shard", of))
    return {a.key.prompt: a.error_code if isinstance(a, Answer) else None for a in out}


def test_a_request_for_each_prompt(folder: Path) -> None:
    requests = prepared(make(folder), row(png(), png(90, 30)))
    assert [r.key for r in requests] == [("shard", 5, "caption"), ("shard", 5, "why")]
    for request in requests:
        assert request.tokens.dtype == np.int32
        assert request.positions.shape == (3, request.num_tokens)
        assert [i.image.width for i in request.images] == [60, 90]
        for image in request.images:
            block = request.tokens[image.start : image.start + image.layout.num_tokens]
            assert len(set(block.tolist())) == 1
        assert request.next_position == request.positions.max() + 1


def test_prompts_that_are_done_are_left_out(folder: Path) -> None:
    preparer = make(folder)
    requests = prepared(preparer, row(png()), done={(5, "caption"), (6, "why")})
    assert [r.key.prompt for r in requests] == ["why"]
    assert not list(preparer.prepare("s", row(png()), {(5, "caption"), (5, "why")}))


def test_seeds_belong_to_row_and_prompt(folder: Path) -> None:
    preparer = make(folder)
    first = {r.key.prompt: r.sampling.seed for r in prepared(preparer, row(png()))}
    again = {r.key.prompt: r.sampling.seed for r in prepared(make(folder), row(png()))}
    other = [r.sampling.seed for r in prepared(preparer, row(png(), index=6))]
    reseeded = prepared(make(folder, generation={"seed": 1}), row(png()))
    seeds = [*first.values(), *other, *(r.sampling.seed for r in reseeded)]
    assert first == again
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_one_bad_prompt_leaves_the_other(folder: Path) -> None:
    assert codes(make(folder), row(png(), columns={})) == {"caption": None, "why": "bad_prompt"}


@pytest.mark.parametrize(
    ("images", "code"),
    [
        ((), "missing_image"),
        ((ImageRef(data=b""),), "empty_image"),
        ((png(), ImageRef(data=b"no image")), "not_an_image"),
        ((png(2100, 10),), "bad_aspect_ratio"),
        ((png(),) * 4, "too_many_images"),
        ((ImageRef(path="/does/not/exist.png"),), "missing_file"),
        ((ImageRef(path="https://example.org/a.png"),), "remote_disabled"),
    ],
)
def test_bad_images_fail_every_prompt(
    folder: Path, images: tuple[ImageRef, ...], code: str
) -> None:
    assert codes(make(folder), row(*images)) == {"caption": code, "why": code}


def test_rows_that_the_source_could_not_read(folder: Path) -> None:
    broken = row(png(), error=RowError("bad_row", "Column x is a map."))
    assert set(codes(make(folder), broken).values()) == {"bad_row"}


def test_a_prompt_must_fit_the_context(folder: Path) -> None:
    preparer = make(folder, engine={"max_context": 100}, generation={"max_new_tokens": 60})
    found = codes(preparer, row(png(), columns={"x": "many words " * 20}))
    assert found == {"caption": None, "why": "prompt_too_long"}


def test_text_that_no_tokenizer_takes(folder: Path) -> None:
    found = codes(make(folder), row(png(), columns={"x": "\ud800"}))
    assert found["why"] == "prepare_error"
    assert found["caption"] is None


def test_text_only_jobs_need_no_image(folder: Path) -> None:
    requests = prepared(make(folder, input={"image": None}), row())
    assert all(not request.images for request in requests)


def test_messages_are_answered_in_one_column(folder: Path) -> None:
    preparer = make(folder, input={"messages": "chat"}, prompts={})
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}]
    (request,) = prepared(preparer, row(png(), messages=messages))
    assert request.key.prompt == "answer"
    assert len(request.images) == 1
    assert codes(preparer, row(png(), messages="?")) == {"answer": "bad_messages"}


def test_system_text_stands_before_the_image(folder: Path) -> None:
    with_text, without = (
        prepared(make(folder, system=text), row(png()))[0] for text in ("Be very brief.", None)
    )
    assert with_text.images[0].start != without.images[0].start


def test_schemas_keep_their_order(folder: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {"const": "é"}}}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schema, indent=2))
    expected = '{"type":"object","properties":{"z":{},"a":{"const":"é"}}}'
    for given in (schema, str(path), json.dumps(schema)):
        prompts = {"caption": {"text": "x", "schema": given}}
        assert prepared(make(folder, prompts=prompts), row(png()))[0].schema == expected
    for wrong in ("/no/such.json", "{", str(folder / "model.safetensors")):
        with pytest.raises(UserError, match="schema"):
            make(folder, prompts={"caption": {"text": "x", "schema": wrong}})


GREEDY = {"temperature": 0.0}


@pytest.mark.parametrize(
    ("checkpoint", "job", "expected"),
    [
        ({}, {}, GREEDY),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {}, GREEDY),
        ({"do_sample": False, "repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
        ({"do_sample": True}, {}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05}, {},
         {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"do_sample": True, "temperature": 0.01, "top_k": 1}, {}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, {},
         {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, GREEDY),
        ({}, {"temperature": 0.5, "min_p": 0.1}, {"temperature": 0.5, "min_p": 0.1}),
        ({"eos_token_id": 3}, {"ignore_eos": True}, {"stop_token_ids": (3,), "ignore_eos": True}),
        ({"eos_token_id": [4, 3]}, {"stop": "END"}, {"stop_token_ids": (4, 3), "stop": ("END",)}),
    ],
)  # fmt: skip
def test_sampling(
    folder: Path, tmp_path: Path, checkpoint: dict[str, Any], job: dict[str, Any],
    expected: dict[str, Any],
) -> None:  # fmt: skip
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(checkpoint))
    settings = LabelSettings(model={"id": str(tmp_path)}, input={"path": "x"})
    family = family_for(Checkpoint.open(settings.model), settings.model)
    prompt = PromptSettings(text="x", max_new_tokens=7)
    found = sampling_params(family, GenerationSettings(**job), prompt)
    assert found.max_new_tokens == 7
    for key, value in expected.items():
        assert getattr(found, key) == value
