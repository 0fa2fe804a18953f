"""The planner's promises, over made-up requests: each once, sharing true, buckets nearly full."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.families.qwen_vl.spec import smart_resize
from pipeline.planner import MAX_GROUP_REQUESTS, MAX_PADDING, Plan, Planner
from pipeline.rows import (
    EncodedImage,
    Group,
    ImageLayout,
    PlacedImage,
    Prefix,
    Request,
    RequestKey,
    SamplingParams,
)
from pipeline.settings import EngineSettings

IMAGE_TOKEN = 999
MIXED_SIZES = [(512, 384), (640, 480), (800, 600), (768, 1024), (1024, 768), (1280, 960)]


def make_request(
    row: int,
    parts: Sequence[list[int] | tuple[bytes, int]],
    prompt: str = "answer",
    shard: str = "s",
) -> Request:
    """A request of texts (token lists) and images (digest, number of tokens)."""
    tokens: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, list):
            tokens += part
            continue
        digest, count = part
        layout = ImageLayout(28, 28 * count, (1, 2, 2 * count), count)
        encoded = EncodedImage(digest.ljust(16, b"\0"), 28 * count, 28, "", 0, 0)
        images.append(PlacedImage(encoded, layout, len(tokens)))
        tokens += [IMAGE_TOKEN] * count
    ids = np.array(tokens, np.int32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    key = RequestKey(shard, row, prompt)
    return Request(key, ids, tuple(images), positions, len(ids), SamplingParams())


def check(plans: Sequence[Plan], requests: Sequence[Request]) -> None:
    """Every invariant that the engine counts on, over plans in their order."""
    current = 0
    prefix: Prefix | None = None
    seen: list[RequestKey] = []
    for plan in plans:
        for item in plan.items:
            if isinstance(item, Prefix):
                prefix, current = item, len(item.tokens)
                assert item.positions.shape[1] == current
                check_images_end(item.images, current)
                continue
            assert item.num_prefix_tokens == current
            check_group(item, prefix)
            seen += [request.key for request in item.requests]
        check_buckets(plan)
    assert sorted(seen) == sorted(request.key for request in requests)


def check_group(group: Group, prefix: Prefix | None) -> None:
    first = group.requests[0]
    assert group.num_shared_tokens >= group.num_prefix_tokens
    for request in group.requests:
        assert request.num_tokens > group.num_shared_tokens
        if prefix is not None:
            assert np.array_equal(request.tokens[: len(prefix.tokens)], prefix.tokens)
            check_same_images(request.images, prefix.images, len(prefix.tokens))
        shared = group.num_shared_tokens
        assert np.array_equal(request.tokens[:shared], first.tokens[:shared])
        check_same_images(request.images, first.images, shared)
        check_images_end([i for i in request.images if i.start < shared], shared)
    assert group.num_prefill_tokens > 0


def check_same_images(
    ours: Sequence[PlacedImage], theirs: Sequence[PlacedImage], stop: int
) -> None:
    identities = [
        [(i.start, i.image.digest, i.layout) for i in images if i.start < stop]
        for images in (ours, theirs)
    ]
    assert identities[0] == identities[1]


def check_images_end(images: Sequence[PlacedImage], stop: int) -> None:
    assert all(image.start + image.layout.num_tokens <= stop for image in images)


def check_buckets(plan: Plan) -> None:
    covered = [i for start, stop in plan.buckets for i in range(start, stop)]
    groups = [i for i, item in enumerate(plan.items) if isinstance(item, Group)]
    assert covered == groups
    for start, stop in plan.buckets:
        members = [plan.items[i] for i in range(start, stop)]
        lengths = [m.num_prefill_tokens for m in members if isinstance(m, Group)]
        assert lengths == sorted(lengths, reverse=True)
        assert 1 - sum(lengths) / (lengths[0] * len(lengths)) <= MAX_PADDING


TEXT = st.lists(st.integers(0, 2), max_size=6)
IMAGE = st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 3))
OPENING = st.sampled_from([[1, 2, 3], [1, 2, 3] * 20, [1, 4], []])
REQUEST = st.tuples(OPENING, st.lists(st.one_of(TEXT, IMAGE), max_size=4), st.integers(0, 3))
WINDOW = st.lists(REQUEST, max_size=24)


@settings(max_examples=300, deadline=None)
@given(st.lists(WINDOW, max_size=4), st.booleans(), st.booleans(), st.sampled_from([8, 64, "auto"]))
def test_each_request_once_and_all_sharing_true(
    windows: list[list[tuple[list[int], list[list[int] | tuple[bytes, int]], int]]],
    share_prefix: bool,
    share_images: bool,
    prefill_tokens: int | str,
) -> None:
    planner = Planner(
        EngineSettings(
            share_prefix=share_prefix, share_images=share_images, prefill_tokens=prefill_tokens
        )
    )
    plans, requests = [], []
    for number, window in enumerate(windows):
        made = [
            make_request(row, [opening, *parts, [7]], f"p{i}", f"s{number}")
            for i, (opening, parts, row) in enumerate(window)
        ]
        plans.append(planner.plan(made))
        requests += made
    check(plans, requests)


def mixed(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for row in range(count):
        width, height = rng.choice(MIXED_SIZES)
        rows, columns = smart_resize(height, width, 28, 3136, 12_845_056)
        image = (row.to_bytes(4, "big"), rows * columns // 28**2)
        made.append(make_request(row, [list(range(14)), image, list(range(20, 32))]))
    return made


@pytest.mark.parametrize("count", [37, 512, 4096])
def test_padding_of_the_mixed_workload(count: int) -> None:
    requests = mixed(count, count)
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    assert plan.stats.padding_share < 0.03
    if count >= 512:
        assert plan.stats.prompt_tokens / plan.stats.num_buckets > 10_000


def test_lengths_that_vary_freely_still_fill_buckets() -> None:
    rng = random.Random(3)
    requests = [make_request(row, [[1] * rng.randint(50, 3000), [row]]) for row in range(2000)]
    plan = Planner(EngineSettings(share_prefix=False)).plan(requests)
    check([plan], requests)
    assert plan.stats.padding_share < 0.03
    assert plan.stats.num_buckets < 500


def test_the_template_is_a_prefix_once() -> None:
    requests = mixed(200, 1)
    planner = Planner(EngineSettings())
    plans = [planner.plan(requests[:100]), planner.plan(requests[100:])]
    check(plans, requests)
    prefixes = [item for plan in plans for item in plan.items if isinstance(item, Prefix)]
    assert [len(p.tokens) for p in prefixes] == [14]
    assert plans[1].stats.prefix_tokens_reused == 14 * 100


def test_an_image_for_all_prompts_of_a_row() -> None:
    requests = [
        make_request(row, [[1] * 14, (bytes([row]), 300), [2, question]], f"q{question}")
        for row in range(10)
        for question in range(8)
    ]
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    groups = [item for item in plan.items if isinstance(item, Group)]
    assert [len(group.requests) for group in groups] == [8] * 10
    assert {group.num_shared_tokens for group in groups} == {14 + 300 + 1}
    assert all(len(group.images) == 1 for group in groups)
    assert plan.stats.num_images == 80
    assert plan.stats.num_images_encoded == 10


def test_images_with_equal_tokens_and_other_content_are_not_shared() -> None:
    requests = [make_request(row, [[1], (bytes([row]), 5), [2]]) for row in range(4)]
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    assert plan.stats.num_images_encoded == 4


def test_examples_with_images_are_part_of_the_prefix() -> None:
    examples = [[1] * 5, (b"example", 40), [2] * 5]
    requests = [make_request(row, [*examples, (bytes([row]), 9), [3]]) for row in range(6)]
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    assert isinstance(plan.items[0], Prefix)
    assert len(plan.items[0].tokens) == 50
    assert plan.stats.num_images_encoded == 7


def test_two_system_texts_have_a_prefix_each() -> None:
    requests = [
        make_request(row, [[1, 2, row % 2] * 30, (row.to_bytes(2, "big"), 9), [3]])
        for row in range(400)
    ]
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    prefixes = [item for item in plan.items if isinstance(item, Prefix)]
    assert [len(p.tokens) for p in prefixes] == [90, 90]


def test_an_odd_request_ends_sharing_and_it_comes_back() -> None:
    usual = [make_request(row, [[1] * 20, [row]]) for row in range(4)]
    odd = [make_request(10 + row, [[row + 5, row]]) for row in range(4)]
    planner = Planner(EngineSettings())
    plans = [planner.plan(usual), planner.plan(odd), planner.plan(odd), planner.plan(usual)]
    keys = [r for window in (usual, odd, odd, usual) for r in window]
    check(plans, keys)
    lengths = [len(i.tokens) for plan in plans for i in plan.items if isinstance(i, Prefix)]
    assert lengths == [20, 0, 20]


def test_a_group_is_bounded_and_prompts_of_text_rows_share() -> None:
    names = (b"one", b"two")
    requests = [make_request(row, [[1], (names[row % 2], 50), [row]]) for row in range(200)]
    requests += [
        make_request(900 + row, [[1], [5, row] * 40, [q]], f"q{q}")
        for row in range(5)
        for q in range(2)
    ]
    plan = Planner(EngineSettings()).plan(requests)
    check([plan], requests)
    sizes = [len(item.requests) for item in plan.items if isinstance(item, Group)]
    assert max(sizes) == MAX_GROUP_REQUESTS
    assert sizes.count(2) == 5


def test_nothing_is_shared_where_the_engine_cannot() -> None:
    requests = [make_request(0, [[1], (b"a", 50), [q]], f"q{q}") for q in range(8)]
    plan = Planner(EngineSettings(), shares=False).plan(requests)
    check([plan], requests)
    assert plan.stats.num_images_encoded == 8
    assert Planner(EngineSettings()).plan([]).items == []


def test_stats_add_up() -> None:
    total = Planner(EngineSettings()).plan(mixed(50, 5)).stats
    once = replace(total)
    total.add(once)
    assert total.num_requests == 100
    assert total.padding_share == pytest.approx(once.padding_share)
