"""The benchmark's parts: workloads are reproducible and distinct, the sums of work are right."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.bench import checkpoint, measure, results, workloads
from scripts.bench.limits import Shapes, work

QWEN_7B = checkpoint.config(checkpoint.SIZES["7b"], checkpoint.ROPE["7b"])
PATCHES = (756 // 14) * (1036 // 14)  # a photograph of 1024 x 768 after the official resize


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_workload_is_its_seed(name: str) -> None:
    one, same, other = (workloads.make(name, 8, seed) for seed in (1, 1, 2))
    assert one == same
    assert not set(one.images) & set(other.images)
    assert len(one.images) == len(one.output_tokens) == len(one.sizes)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_images_have_the_sizes_that_are_named(name: str) -> None:
    load = workloads.make(name, 8, 3)
    assert tuple(Image.open(io.BytesIO(data)).size for data in load.images) == load.sizes


def test_a_warm_up_passes_every_number_of_lanes() -> None:
    load = workloads.make("vqa", 24, 1)
    warm = workloads.thumbnails(load, 24)
    assert (warm.prompts, warm.num_answers) == (load.prompts, 24)
    assert Image.open(io.BytesIO(warm.images[0])).size == workloads.SHARED_THUMBNAIL
    chosen = measure.settings("demo", [warm, load], {"device": "cpu"}, {})
    assert {p.max_new_tokens for p in chosen.prompts.values()} == {2, 3, 4, 16}


def test_a_warm_up_shares_images_as_the_workload_does() -> None:
    from pipeline.engine.cascade import MIN_LENGTH

    width, height = workloads.SHARED_THUMBNAIL
    assert width // 28 * (height // 28) >= MIN_LENGTH
    alone = workloads.thumbnails(workloads.make("caption", 4, 1), 4)
    assert alone.sizes[0] == workloads.THUMBNAIL


def test_vqa_asks_eight_questions_of_each_image() -> None:
    load = workloads.make("vqa", 24, 1)
    assert (len(load.images), load.num_answers) == (3, 24)


def test_every_row_gets_its_own_answer_length() -> None:
    load = workloads.make("mixed", 8, 1)
    chosen = measure.settings("demo", [load], {"device": "cpu"}, {})
    asked = measure.shard(load, "s", frozenset(chosen.prompts))
    for row in range(8):
        left = [n for n in chosen.prompts if (row, n) not in asked.done]
        assert [chosen.prompts[n].max_new_tokens for n in left] == [load.output_tokens[row]]


def test_work_of_a_caption_is_what_was_counted_by_hand() -> None:
    found = work(Shapes.of(QWEN_7B), [PATCHES], [(1026, 0, 128)])
    assert found.vision / 1e12 == pytest.approx(5.4, abs=0.15)
    assert found.prefill / 1e12 == pytest.approx(13.6, abs=0.1)
    assert 794e12 / found.flops == pytest.approx(38, abs=0.5)


def test_a_cache_in_float8_is_read_in_half_the_bytes() -> None:
    shapes = Shapes.of(QWEN_7B)
    plain, eight = (work(shapes, [], [(1026, 0, 128)], 2, float8) for float8 in (False, True))
    assert shapes.kv_bytes() == 2 * 28 * 4 * 128 * 2
    assert eight.decode_bytes / plain.decode_bytes == pytest.approx((128 + 4) / 256)
    assert eight.flops == plain.flops


def test_cached_tokens_are_no_work() -> None:
    shapes = Shapes.of(QWEN_7B)
    assert shapes.prefill_flops(1000, 990) < shapes.prefill_flops(1000, 0) / 50


def test_random_checkpoint_has_seven_billion_parameters() -> None:
    total = 0
    for _, shape in checkpoint.tensors(checkpoint.SIZES["7b"]):
        size = 1
        for length in shape:
            size *= length
        total += size
    assert total == pytest.approx(8.29e9, rel=0.01)


def test_counters_are_flattened() -> None:
    assert measure.flat({"a": {"b": {"c": 1}, "d": 2.5, "e": "x"}}) == {"a.b.c": 1, "a.d": 2.5}


def test_a_result_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    for number in range(2):
        results.append({"name": "x", "number": number}, file)
    lines = file.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1]
    assert capsys.readouterr().out.splitlines() == lines


def test_quantiles_are_measured_values() -> None:
    assert results.quantiles([3.0, 1.0, 2.0]) == {"p20": 1.0, "p50": 2.0, "p80": 3.0}
