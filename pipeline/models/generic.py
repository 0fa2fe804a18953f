"""Any image-text-to-text model of transformers, unfused: its own processor and `generate`.

The same `run(feed)` as the fused engine's, batch by batch with left padding, for models that have
no family of their own. Runs no code from a checkpoint. Knows no template and no architecture.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.engine.guided import Grammars
from pipeline.engine.stats import EngineStats
from pipeline.errors import EngineError, RowError, UserError
from pipeline.feeder import END, Feed
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.generic_rows import BatchRow, RowSampler, RowsDone
from pipeline.rows import Completion, Group, Request
from pipeline.settings import LabelSettings
from pipeline.tokenizer import Tokenizer

CPU_ROWS, CUDA_ROWS = 8, 32
BATCH_TOKENS = 32_768  # of prompts, by the planner's count
OUT_OF_MEMORY = torch.OutOfMemoryError


@dataclass(slots=True, eq=False)
class Work:
    """One request with its images."""

    request: Request
    images: tuple[np.ndarray | RowError, ...]

    @property
    def error(self) -> RowError | None:
        return next((i for i in self.images if isinstance(i, RowError)), None)


class GenericEngine:
    """Runs fed groups through transformers; slow beside the fused engine, and never wrong."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, settings: LabelSettings, device: torch.device
    ) -> None:
        self.family = family
        self.device = device
        self.max_rows = _num_rows(settings, device)
        self.processor, self.model = _load(checkpoint, settings, device)
        self.tokenizer = Tokenizer(checkpoint)
        self.stats = EngineStats()
        self.draining = False
        self._tokenizer_json = checkpoint.tokenizer_json
        self._grammars: Grammars | None = None

    def run(self, feed: Feed) -> Iterator[Completion | None]:
        """Complete every fed request once. Ends with the feed; None as the fused engine's."""
        waiting: deque[Work] = deque()
        fed = True
        while not self.draining:
            while fed and len(waiting) < 2 * self.max_rows:
                item = feed.get(0.0 if waiting else 0.1)
                if item is END:
                    fed = False
                elif item is not None:
                    waiting.extend(_works(item))
                    item.release()
                else:
                    break
            if waiting:
                yield from self._answer(self._next_batch(waiting))
            elif fed:
                yield None
            else:
                return

    def _next_batch(self, waiting: deque[Work]) -> list[Work]:
        """Take works from the front: all with images or all without, within the batch's size."""
        batch = [waiting.popleft()]
        longest = batch[0].request.num_tokens
        while waiting and len(batch) < self.max_rows:
            work = waiting[0]
            longest = max(longest, work.request.num_tokens)
            if bool(work.images) != bool(batch[0].images):
                break
            if longest * (len(batch) + 1) > BATCH_TOKENS:
                break
            batch.append(waiting.popleft())
        return batch

    def _answer(self, batch: list[Work]) -> Iterator[Completion]:
        """Run the batch; what fails together is tried in halves, what fails alone fails."""
        for work in batch:
            if work.error is not None:
                yield _failed(work.request, work.error)
        batch = [work for work in batch if work.error is None]
        if not batch:
            return
        try:
            completions = self._generate(batch)
        except OUT_OF_MEMORY:
            self.stats.num_out_of_memory += 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            error = RowError("out_of_memory")
        except RowError as problem:
            error = problem
        else:
            yield from completions
            return
        if len(batch) == 1:
            yield _failed(batch[0].request, error)
            return
        middle = len(batch) // 2
        yield from self._answer(batch[:middle])
        yield from self._answer(batch[middle:])

    @torch.inference_mode()
    def _generate(self, batch: list[Work]) -> list[Completion]:
        start = time.perf_counter()
        inputs = self._inputs(batch)
        lengths = inputs["attention_mask"].sum(1).tolist()
        fits = self._fitting(batch, lengths)
        if fits != batch:
            rejected = [w for w in batch if w not in fits]
            done = [_failed(w.request, RowError("prompt_too_long")) for w in rejected]
            return done + (self._generate(fits) if fits else [])
        rows = [self._row(work.request) for work in batch]
        sampler = RowSampler(rows, inputs["input_ids"], inputs["attention_mask"])
        try:
            self.model.generate(
                **inputs,
                generation_config=self._generation_config(rows),
                logits_processor=[sampler],
                stopping_criteria=[RowsDone(rows, self.tokenizer)],
            )
        except OUT_OF_MEMORY:
            raise
        except torch.AcceleratorError as error:
            raise EngineError(f"The device failed: {error}") from error
        except Exception as error:  # a model's own complaint about a row's shape
            raise RowError("engine_error", f"The model failed: {_line(error)}") from error
        self._count(batch, rows, lengths, time.perf_counter() - start)
        return [row.completion(n) for row, n in zip(rows, lengths, strict=True)]

    def _inputs(self, batch: list[Work]) -> Any:
        texts = [work.request.text or "" for work in batch]
        options: dict[str, Any] = {}
        if batch[0].images:
            options["images"] = [[Image.fromarray(i) for i in w.images] for w in batch]  # type: ignore[arg-type]
        begin = getattr(self._text_tokenizer, "bos_token", None)
        if begin and texts[0].startswith(begin):
            options["add_special_tokens"] = False  # the template wrote it
        try:
            inputs = self.processor(text=texts, padding=True, return_tensors="pt", **options)
        except Exception as error:  # of any kind: processors are foreign code
            raise RowError("prepare_error", f"The model's processor: {_line(error)}") from error
        return inputs.to(self.device, self.model.dtype)

    @property
    def _text_tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _fitting(self, batch: list[Work], lengths: list[int]) -> list[Work]:
        """Keep what fits the context: only the processor knows how long a prompt really is."""
        limit = self.family.context_length
        return [
            work
            for work, length in zip(batch, lengths, strict=True)
            if length + work.request.sampling.max_new_tokens <= limit
        ]

    def _row(self, request: Request) -> BatchRow:
        matcher = None
        if request.schema is not None:
            if self._grammars is None:
                vocabulary = self.model.get_output_embeddings().weight.shape[0]
                stops = self.family.eos_token_ids
                self._grammars = Grammars(self._tokenizer_json, vocabulary, stops)
            matcher = self._grammars.matcher(request.schema)
        return BatchRow(request, matcher)

    def _generation_config(self, rows: Sequence[BatchRow]) -> Any:
        from transformers import GenerationConfig

        stops = self.family.eos_token_ids
        pad = getattr(self._text_tokenizer, "pad_token_id", None)
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max(row.request.sampling.max_new_tokens for row in rows),
            pad_token_id=pad if pad is not None else (stops[0] if stops else 0),
            eos_token_id=None,  # rows end by `RowsDone`
        )

    def _count(
        self, batch: list[Work], rows: list[BatchRow], lengths: list[int], seconds: float
    ) -> None:
        stats = self.stats
        stats.seconds["generate"] += seconds
        stats.num_prefill_batches += 1
        stats.num_prefill_tokens += sum(lengths)
        stats.num_prompt_tokens += sum(lengths)
        stats.num_images += sum(len(work.images) for work in batch)
        steps = max(len(row.output_ids) for row in rows)
        stats.num_steps += steps
        stats.num_lane_steps += steps * len(rows)
        stats.num_running_lane_steps += sum(len(row.output_ids) for row in rows)
        stats.num_output_tokens += sum(len(row.output_ids) for row in rows)


def _works(fed: Any) -> list[Work]:
    """Give each request of a fed group its own images, copied out of the shared memory."""
    if not isinstance(fed.item, Group):
        return []
    group = fed.item
    images = [i if isinstance(i, RowError) else np.array(i) for i in fed.images]
    first = [i for i in group.requests[0].images if i.start >= group.num_prefix_tokens]
    shared = images[: sum(i.start < group.num_shared_tokens for i in first)]
    place = len(first)
    works = [Work(group.requests[0], tuple(images[:place]))]
    for request in group.requests[1:]:
        own = sum(i.start >= group.num_shared_tokens for i in request.images)
        works.append(Work(request, (*shared, *images[place : place + own])))
        place += own
    return works


def _failed(request: Request, error: RowError) -> Completion:
    return Completion(request.key, (), "error", request.num_tokens, 0, error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _num_rows(settings: LabelSettings, device: torch.device) -> int:
    slots = settings.engine.decode_slots
    if slots != "auto":
        return slots
    return CUDA_ROWS if device.type == "cuda" else CPU_ROWS


def _dtype(settings: LabelSettings, device: torch.device) -> torch.dtype:
    name = settings.model.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _load(checkpoint: Checkpoint, settings: LabelSettings, device: torch.device) -> tuple[Any, Any]:
    """Return the checkpoint's processor and model. Raises UserError in one sentence."""
    if settings.model.quantization != "none":
        raise UserError(
            f"model.quantization {settings.model.quantization!r} works with the fused families "
            "only (`vlm-batch models` lists them); write `none`."
        )
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint.weight_files()  # fetched by now, or a sentence
    folder = checkpoint.folder
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=_dtype(settings, device), local_files_only=True
        )
    except Exception as error:
        raise UserError(
            f"model.id {checkpoint.id!r}: transformers cannot load it: {_line(error)}"
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig()  # ours alone counts
    return processor, model.to(device).eval()
