"""The labeller beside transformers' `generate` on a CPU: the same texts? how many times as fast?

Both see the same rows in one process, turn and turn about, greedy, in float32, from encoded image
bytes to text. transformers runs in left-padded batches of one prompt's rows, at the best of a few
batch sizes. For Qwen2-VL and Qwen2.5-VL checkpoints, the model that ships among them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.rows import ImageRef, Row, ShardWork
from pipeline.settings import (
    EngineSettings,
    GenerationSettings,
    InputSettings,
    LabelSettings,
    ModelSettings,
    PromptSettings,
)
from scripts.bench import workloads
from scripts.bench.check_peer import Asked, Peer

BATCH_SIZES = (8, 16, 32, 64)  # as far as there are rows
PROBE_ROWS = 24  # of which the best batch size is found
DEMO_PROMPTS = {
    "caption": ("Describe this image.", 64),
    "objects": ("List the objects as JSON.", 96),
    "answer": ("{question}", 64),
}
OTHER_PROMPTS = {"answer": ("Describe the image.", 48)}


@dataclass(frozen=True)
class Table:
    """Encoded images with their questions, and the prompts asked of each."""

    images: list[bytes]
    questions: list[str]
    prompts: dict[str, tuple[str, int]]

    def asked(self, num_rows: int | None = None) -> list[Asked]:
        rows = range(len(self.images))[:num_rows]
        return [
            Asked((row, name), self.images[row], self._fill(text, row), limit)
            for name, (text, limit) in self.prompts.items()
            for row in rows
        ]

    def _fill(self, text: str, row: int) -> str:
        return self.questions[row] if text == "{question}" else text

    def rows(self) -> Iterator[Row]:
        for i, (data, question) in enumerate(zip(self.images, self.questions, strict=True)):
            yield Row(str(i), i, {"question": question}, (ImageRef(data=data),))


def table(model: str, num_rows: int, seed: int) -> Table:
    """The shipped scenes with the questions that belong to them, or photographs."""
    if model != "demo":
        images = list(workloads.make("mixed", num_rows, seed).images)
        return Table(images, [""] * num_rows, OTHER_PROMPTS)
    import pyarrow.parquet as pq

    from pipeline import demo

    scenes = pq.read_table(demo.SCENES, columns=["image", "question"]).to_pylist()[:num_rows]
    return Table(
        [scene["image"]["bytes"] for scene in scenes],
        [scene["question"] for scene in scenes],
        DEMO_PROMPTS,
    )


def run(model: str, num_rows: int, seed: int, reps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Label the rows with both, `reps` times each; equal texts and both speeds."""
    rows = table(model, num_rows, seed)
    chosen = _settings(model, rows, options)
    ours = _Ours(chosen, rows)
    try:
        peer = Peer(chosen.model)
        ours.label("warmup")
        sizes = _probe(peer, rows)
        best = min(sizes, key=lambda size: sizes[size])
        pairs = [(ours.label(f"rep{i}"), _timed(peer, rows, best)) for i in range(reps)]
    finally:
        ours.close()
    return _found(rows, pairs, best, sizes)


def _found(rows: Table, pairs: list, best: int, sizes: dict[int, float]) -> dict[str, Any]:
    mine, theirs = pairs[-1][0].texts, pairs[-1][1].texts
    differing = sorted(key for key, text in theirs.items() if mine[key] != text)
    answers = len(theirs)
    return {
        "rows": len(rows.images),
        "answers": answers,
        "equal": answers - len(differing),
        "differing": [f"{row}/{prompt}" for row, prompt in differing[:20]],
        "answers_per_s": _median(answers / a.seconds for a, _ in pairs),
        "transformers_answers_per_s": _median(answers / b.seconds for _, b in pairs),
        "ratio": _median(b.seconds / a.seconds for a, b in pairs),
        "cpu_ratio": _median(b.cpu / a.cpu for a, b in pairs),
        "seconds": [[round(a.seconds, 2), round(b.seconds, 2)] for a, b in pairs],
        "cpu_seconds": [[round(a.cpu, 2), round(b.cpu, 2)] for a, b in pairs],
        "batch": best,
        "batch_seconds_an_answer": {
            str(size): round(seconds, 4) for size, seconds in sizes.items()
        },
    }


def headline(found: dict[str, Any]) -> str:
    return (
        f"{found['equal']} of {found['answers']} texts are equal to transformers'; "
        f"{found['answers_per_s']} answers/s against {found['transformers_answers_per_s']} in "
        f"batches of {found['batch']}: {found['ratio']} x (processor time {found['cpu_ratio']} x)"
    )


def _median(values: Any) -> float:
    return round(statistics.median(values), 3)


def _settings(model: str, rows: Table, options: dict[str, Any]) -> LabelSettings:
    return LabelSettings(
        model=ModelSettings(id=model, dtype="float32", **options),
        input=InputSettings(path="memory"),
        prompts={
            name: PromptSettings(text=text, max_new_tokens=limit)
            for name, (text, limit) in rows.prompts.items()
        },
        generation=GenerationSettings(temperature=0.0),
        engine=EngineSettings(device="cpu"),
    )


@dataclass(frozen=True)
class Pass:
    """One pass over the rows: wall and processor seconds, and the texts."""

    seconds: float
    cpu: float
    texts: dict[tuple[int, str], str]


class _Ours:
    def __init__(self, chosen: LabelSettings, rows: Table) -> None:
        from pipeline.labeller import Labeller

        self._labeller = Labeller(chosen)
        self._rows = rows

    def label(self, name: str) -> Pass:
        clock = _Clock()
        answers = list(self._labeller.label([ShardWork(name, self._rows.rows())]))
        texts = {(a.key.row, a.key.prompt): a.text or f"({a.error})" for a in answers}
        return Pass(*clock.read(), texts)

    def close(self) -> None:
        self._labeller.close()


class _Clock:
    """Wall time, and processor time of this process and its living children."""

    def __init__(self) -> None:
        self._started = (time.perf_counter(), _cpu_seconds())

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._started[0], _cpu_seconds() - self._started[1]


def _cpu_seconds() -> float:
    """Of this process and the processes it started and has not ended."""
    from scripts.bench.processes import family_cpu_seconds

    return family_cpu_seconds()


def _timed(peer: Peer, rows: Table, batch: int, num_rows: int | None = None) -> Pass:
    clock = _Clock()
    texts = peer.answer(rows.asked(num_rows), batch)
    return Pass(*clock.read(), texts)


def _probe(peer: Peer, rows: Table) -> dict[int, float]:
    """Seconds an answer at each batch size: the quicker of two passes over the first rows."""
    _timed(peer, rows, 8, 2)
    found: dict[int, float] = {}
    sizes = [size for size in BATCH_SIZES if size <= len(rows.images)] or BATCH_SIZES[:1]
    for size in (*sizes, *sizes):
        num_rows = min(max(PROBE_ROWS, size), len(rows.images))
        seconds = _timed(peer, rows, size, num_rows).seconds / (num_rows * len(rows.prompts))
        found[size] = min(seconds, found.get(size, seconds))
    return found
