"""Runs one workload through the labeller in this process and measures it, stage by stage.

Time runs from encoded image bytes to the last answer's text. Every repetition has images of its
own. Knows no file of results and no other engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.rows import Answer, ImageRef, Row, ShardWork
from pipeline.settings import (
    EngineSettings,
    GenerationSettings,
    InputSettings,
    LabelSettings,
    ModelSettings,
    PromptSettings,
)
from scripts.bench import workloads
from scripts.bench.limits import Peaks, Shapes, Work, work, work_of_sizes
from scripts.bench.workloads import Workload

BUSY = ("steps", "lane_steps", "busy_steps", "busy_lane_steps")
RATIOS = ("_share", "_occupancy")  # of the labeller's counters: not to be subtracted


@dataclass
class Repetition:
    """One timed pass over one workload."""

    workload: Workload
    seconds: float
    answers: list[Answer]
    stats: dict[str, float]  # what Labeller.stats() counted during the pass, flat

    @property
    def num_failed(self) -> int:
        return sum(answer.error_code is not None for answer in self.answers)

    @property
    def num_output_tokens(self) -> int:
        return sum(answer.num_output_tokens for answer in self.answers)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(answer.num_prompt_tokens for answer in self.answers)

    @property
    def padding_share(self) -> float:
        """Of the prefill batches' rectangles: what holds no token."""
        rectangle = self.stats.get("plan.rectangle_tokens", 0)
        reused = ("plan.prefix_tokens_reused", "plan.image_tokens_reused")
        used = self.stats.get("plan.prompt_tokens", 0) - sum(self.stats.get(k, 0) for k in reused)
        return 1 - used / rectangle if rectangle else 0.0

    @property
    def slot_occupancy(self) -> float:
        """Of all slots in all steps: those that ran. Prefills make the first tokens, no step."""
        steps = self.stats.get("engine.num_lane_steps", 0)
        return self.stats.get("engine.num_running_lane_steps", 0) / steps if steps else 0.0

    @property
    def busy_occupancy(self) -> float | None:
        """The same in the steps that were run while more work waited; None if there were none."""
        count = {key: self.stats.get(f"engine.num_{key}", 0) for key in BUSY}
        if not count["busy_steps"]:
            return None
        slots = count["lane_steps"] / count["steps"]
        return count["busy_lane_steps"] / count["busy_steps"] / slots

    @property
    def num_cached_tokens(self) -> int:
        return sum(answer.num_cached_tokens for answer in self.answers)


@dataclass
class Measurement:
    """All repetitions of one workload, and what came before them."""

    start_seconds: float  # opening the model
    warmup_seconds: float
    repetitions: list[Repetition] = field(default_factory=list)


def settings(
    model: str, loads: list[Workload], engine: dict[str, Any], model_options: dict[str, Any]
) -> LabelSettings:
    """One job's settings that fit all the workloads: same system, every answer length a prompt.

    A prompt's name is `<prompt>_<tokens>`: an answer's length is a setting of its prompt, so a
    row with a length of its own has the other lengths' prompts marked as done.
    """
    first = loads[0]
    names = {prompt_name(p, n): (p, n) for w in loads for p in w.prompts for n in w.output_tokens}
    return LabelSettings(
        model=ModelSettings(id=model, **model_options),
        input=InputSettings(path="memory"),
        prompts={
            name: PromptSettings(text=first.prompts[prompt], max_new_tokens=tokens)
            for name, (prompt, tokens) in names.items()
        },
        system=None if first.system == workloads.PLAIN_SYSTEM else first.system,
        generation=GenerationSettings(temperature=0.0, ignore_eos=True),
        engine=EngineSettings(**engine),
    )


def prompt_name(prompt: str, num_tokens: int) -> str:
    return f"{prompt}_{num_tokens}"


def shard(workload: Workload, name: str, all_prompts: frozenset[str]) -> ShardWork:
    """The workload as the shard that a worker would hand over."""
    done = set()
    for index, tokens in enumerate(workload.output_tokens):
        wanted = {prompt_name(prompt, tokens) for prompt in workload.prompts}
        done |= {(index, prompt) for prompt in all_prompts - wanted}
    return ShardWork(shard=name, rows=_rows(workload, name), done=frozenset(done))


def _rows(workload: Workload, name: str) -> Iterator[Row]:
    for index, data in enumerate(workload.images):
        yield Row(f"{name}:{index}", index, {}, (ImageRef(data=data),))


def measure(chosen: LabelSettings, warmups: list[Workload], loads: list[Workload]) -> Measurement:
    """Open the model, warm it up, and time every workload."""
    from pipeline.labeller import Labeller

    started = time.perf_counter()
    labeller = Labeller(chosen)
    opened = time.perf_counter()
    try:
        prompts = frozenset(chosen.prompts)
        for number, warmup in enumerate(warmups):
            _check(list(labeller.label([shard(warmup, f"warmup{number}", prompts)])))
        found = Measurement(opened - started, time.perf_counter() - opened)
        _reset_peak(labeller)
        for number, workload in enumerate(loads):
            found.repetitions.append(_repeat(labeller, workload, f"rep{number}", prompts))
    finally:
        labeller.close()
    return found


def _check(answers: list[Answer]) -> None:
    """Raises: SystemExit where the model answers nothing, so that no device time is lost on it."""
    failed = [answer for answer in answers if answer.error_code is not None]
    if failed and len(failed) == len(answers):
        raise SystemExit(f"Every answer of the warm-up failed: {failed[0].error}")


def _repeat(labeller: Any, workload: Workload, name: str, prompts: frozenset[str]) -> Repetition:
    asked = shard(workload, name, prompts)
    before = flat(labeller.stats())
    started = time.perf_counter()
    answers = list(labeller.label([asked]))
    seconds = time.perf_counter() - started
    after = flat(labeller.stats())
    if len(answers) != workload.num_answers:
        raise SystemExit(f"{len(answers)} answers came back of {workload.num_answers}.")
    counted = {
        key: round(value - before.get(key, 0), 4)
        for key, value in after.items()
        if not key.endswith(RATIOS)
    }
    return Repetition(workload, seconds, answers, counted)


def flat(stats: dict[str, Any], start: str = "") -> dict[str, float]:
    """Nested counters as one level: {"engine": {"seconds": {"vision": 1.0}}} by dotted names."""
    found: dict[str, float] = {}
    for key, value in stats.items():
        if isinstance(value, dict):
            found |= flat(value, f"{start}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[start + key] = value
    return found


def cap_memory(gigabytes: float) -> None:
    """Let torch fail beyond this much, so that a smaller card is not only pretended.

    The context, which torch does not count, takes half a gigabyte of it.
    """
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes - 0.5) * 1e9 / total))


def _reset_peak(labeller: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def needed_work(
    repetition: Repetition,
    model: str,
    options: dict[str, Any],
    value_bytes: int = 2,
    float8: bool = False,
) -> tuple[Work, Shapes | None] | None:
    """The floating point work of a repetition's answers; None for a family that tells no sizes.

    The shapes are Qwen-VL's; for other families the work follows from their sizes alone.
    `value_bytes` and `float8` are those of keys and values in the cache.
    """
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.registry import family_for

    chosen = ModelSettings(id=model, **options)
    checkpoint = Checkpoint.open(chosen)
    family = family_for(checkpoint, chosen)
    layouts = [family.layout(*size) for size in repetition.workload.sizes]
    answers = [
        (a.num_prompt_tokens, a.num_cached_tokens, a.num_output_tokens) for a in repetition.answers
    ]
    try:
        shapes = Shapes.of(checkpoint.config)
    except KeyError:
        if not family.sizes.num_params:
            return None
        tokens = [x.num_tokens for x in layouts]
        return work_of_sizes(family.sizes, tokens, answers, value_bytes, float8), None
    patches = [frames * rows * columns for frames, rows, columns in (x.grid for x in layouts)]
    return work(shapes, patches, answers, value_bytes, float8), shapes


def limit_share(repetition: Repetition, needed: Work, peaks: Peaks) -> float:
    """The time that the work takes at the matrix peak, as a share of the time that it took."""
    return needed.flops / peaks.flops / repetition.seconds
