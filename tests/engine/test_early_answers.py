"""Rows that fail before the engine are answered at once, also while nothing else has come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pipeline.errors import RowError
from pipeline.labeller import Labeller
from pipeline.rows import Row, ShardWork
from pipeline.settings import LabelSettings


def test_failed_rows_do_not_wait_for_others() -> None:
    settings = LabelSettings.model_validate(
        {
            "model": {"id": "demo"},
            "input": {"path": "-", "image": None},
            "prompts": {"p": {"text": "How many?", "max_new_tokens": 2}},
            "engine": {"device": "cpu", "decode_slots": 4},
        }
    )
    answered, seen = threading.Event(), []

    def rows() -> Iterator[Row]:
        for index in range(3):
            yield Row(f"r{index}", index, {}, error=RowError("missing_file"))
        seen.append(answered.wait(20))
        yield Row("r3", 3, {})

    labeller = Labeller(settings)
    try:
        found = []
        for answer in labeller.label([ShardWork("s", rows())]):
            found.append(answer)
            answered.set()
    finally:
        labeller.close()
    assert seen == [True], "the failures came only with the last row"
    assert [a.error_code for a in found] == ["missing_file"] * 3 + [None]
