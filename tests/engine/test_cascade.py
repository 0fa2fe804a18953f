"""Ranges that lanes share: the table covers each once; on a GPU the answers stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import cascade
from pipeline.engine.slots import MAX_SEGMENTS
from tests.engine.engine_bench import TEXTS, Bench, outputs, picture

RANGES = [(1, 300), (400, 900), (1400, 140), (1600, 20)]


def sequences(choices: list[tuple[bool, int]]) -> list[Any]:
    """Fake sequences: with or without the first range, and one of the others (0: none)."""
    made = []
    for prefix, group in choices:
        held = ([RANGES[0]] if prefix else []) + ([RANGES[group]] if group else [])
        request = SimpleNamespace(num_tokens=sum(n for _, n in held) + 10)
        made.append(SimpleNamespace(segments=tuple(held), request=request, output_ids=[]))
    return made


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_every_taken_segment_is_read_once(choices: list[tuple[bool, int]]) -> None:
    listed = sequences(choices)
    table = cascade.share(listed, 9)
    if table is None:
        return
    read = set()
    for segment, start, length, *columns in table.items.tolist():
        for column in columns:
            if column < 0:
                continue
            held = listed[column].segments
            assert held[segment - (MAX_SEGMENTS - 1 - len(held))] == (start, length)
            assert length >= cascade.MIN_LENGTH
            assert (column, segment) not in read
            read.add((column, segment))
    taken = {(c, s) for c, row in enumerate(table.taken.tolist()) for s, on in enumerate(row) if on}
    assert taken == read


def test_little_sharing_is_left_alone() -> None:
    assert cascade.share(sequences([(False, 2), (False, 1), (False, 0)]), 9) is None
    table = cascade.share(sequences([(True, 1)] * 20), 9)
    assert table is not None
    assert table.items[:, :3].tolist() == [[0, 1, 300]] * 3 + [[1, 400, 900]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_the_same_tokens_on_a_gpu(
    folder: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**engine: Any) -> dict[Any, tuple[int, ...]]:
        engine |= {"device": "cuda", "decode_slots": 32, "cuda_graphs": graphs}
        bench = Bench.open(folder, **engine).with_model(dtype="float32")
        requests = [
            bench.request(row, f"{text} {number}", [picture(row, 392, 336)], f"p{number}")
            for row in range(3)
            for number, text in enumerate(TEXTS * 3)
        ]
        return outputs(bench.run(requests))

    made: list[Any] = []
    share = cascade.share

    def counted(*arguments: Any) -> Any:
        made.append(share(*arguments))
        return made[-1]

    monkeypatch.setattr("pipeline.engine.decode.share", counted)
    monkeypatch.setattr(cascade, "MIN_LENGTH", 16)
    found = run()
    assert any(table is not None for table in made)
    assert run(share_images=False, share_prefix=False) == found


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    import torch

    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept
