"""How sequences end: stop tokens, stop strings, lengths, schemas, bad images, bad numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import RowError
from tests.engine.engine_bench import PIXELS, Bench, outputs, picture, questions


@pytest.fixture
def bench(folders: dict[str, Path]) -> Bench:
    return Bench.open(folders["qwen2_5_vl"])


def test_stop_token_ends_and_is_left_out(bench: Bench) -> None:
    plain = bench.run(questions(bench, rows=2))
    key, long = next((k, c.output_ids) for k, c in plain.items())
    stop = long[4]
    found = bench.run(questions(bench, rows=2, stop_token_ids=(stop,)))
    assert found[key].output_ids == long[: long.index(stop)]
    assert found[key].finish_reason == "stop"


def test_one_new_token(bench: Bench) -> None:
    found = bench.run(questions(bench, rows=2, max_new_tokens=1))
    assert {len(c.output_ids) for c in found.values()} == {1}
    assert {c.finish_reason for c in found.values()} == {"length"}


def test_ignore_eos(bench: Bench) -> None:
    every = tuple(range(16))
    requests = questions(bench, rows=2, stop_token_ids=every, ignore_eos=True)
    assert {len(c.output_ids) for c in bench.run(requests).values()} == {12}


def test_a_stop_string_of_many_tokens(bench: Bench) -> None:
    plain = bench.run(questions(bench, rows=1, max_new_tokens=60, ignore_eos=True))
    key, ids = next((k, c.output_ids) for k, c in plain.items())
    stop = bench.tokenizer.decode(ids[4:50])
    found = bench.run(questions(bench, rows=1, max_new_tokens=60, ignore_eos=True, stop=(stop,)))[
        key
    ]
    assert found.finish_reason == "stop"
    assert len(found.output_ids) <= 50


def test_stop_string(bench: Bench) -> None:
    plain = bench.run(questions(bench, rows=2))
    for key, completion in plain.items():
        text = bench.tokenizer.decode(completion.output_ids)
        stop = text[3:5]
        requests = [r for r in questions(bench, rows=2, stop=(stop,)) if r.key == key]
        found = bench.run(requests)[key]
        assert found.finish_reason == "stop"
        assert stop in bench.tokenizer.decode(found.output_ids)
        assert len(found.output_ids) <= len(completion.output_ids)


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
    }
)


def test_schema_is_followed_beside_free_rows(bench: Bench) -> None:
    free = questions(bench, rows=2)
    plain = outputs(bench.run(free))
    pixels = picture(7, 60, 60)
    guided = [
        bench.request(50 + i, "How many?", [pixels], schema=SCHEMA, max_new_tokens=40)
        for i in range(3)
    ]
    found = bench.run([*free, *guided])
    assert {k: c.output_ids for k, c in found.items() if k in plain} == plain
    for request in guided:
        text = bench.tokenizer.decode(found[request.key].output_ids)
        assert found[request.key].finish_reason == "stop", text
        assert set(json.loads(text)) == {"n"}


def test_a_bad_image_fails_its_rows_only(bench: Bench) -> None:
    requests = questions(bench, rows=4)
    plain = outputs(bench.run(requests))
    broken = requests[0].images[0].image.digest
    whole, PIXELS[broken] = PIXELS[broken], RowError("truncated_image")
    try:
        found = bench.run(requests)
    finally:
        PIXELS[broken] = whole
    for request in requests:
        completion = found[request.key]
        if any(i.image.digest == broken for i in request.images):
            assert completion.error is not None
            assert completion.error.code == "truncated_image"
        else:
            assert completion.output_ids == plain[request.key]


def test_not_a_number_fails_the_row(bench: Bench) -> None:
    engine = bench.engine()
    original, calls = engine.model.decoder.logits, []

    def poisoned(hidden: torch.Tensor, **options: bool) -> torch.Tensor:
        logits = original(hidden, **options)
        calls.append(len(logits))
        if len(calls) == 3:
            logits[0] = float("nan")
        return logits

    engine.model.decoder.logits = poisoned
    requests = questions(bench)
    plain = outputs(bench.run(requests))
    found = bench.run(requests, engine)
    bad = [c for c in found.values() if c.error is not None]
    assert [c.error.code for c in bad if c.error] == ["numerical_error"]
    assert all(c.output_ids == plain[k] for k, c in found.items() if c.error is None)


def test_a_prompt_larger_than_the_cache_fails(bench: Bench) -> None:
    engine = bench.engine()
    engine.scheduler.pool.size = 60
    requests = questions(bench)
    found = bench.run(requests, engine)
    codes = {c.error.code for c in found.values() if c.error is not None}
    assert codes == {"out_of_memory"}
    assert any(c.error is None for c in found.values())


def test_everything_is_given_back(bench: Bench) -> None:
    engine = bench.engine()
    pool = engine.scheduler.pool
    bench.run(questions(bench), engine)
    held = engine.scheduler.prefix.extent.length if engine.scheduler.prefix else 0
    assert pool.num_free == pool.size - held
    assert sorted(engine.scheduler.free_lanes) == list(range(engine.scheduler.num_slots))


def test_computed_and_cached_tokens_add_up(bench: Bench) -> None:
    engine = bench.engine()
    bench.run(questions(bench), engine)
    stats, prefix = engine.stats, engine.scheduler.prefix
    held = prefix.extent.length if prefix is not None else 0
    assert stats.num_prefill_tokens + stats.num_cached_tokens == stats.num_prompt_tokens + held
