"""Rows of one `generate` call, each with its own sampling, seed, schema and end.

`RowSampler` turns logits so that a greedy choice is the row's draw; `RowsDone` tells transformers
which rows have ended. A row's tokens depend on its own seed and logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.engine.guided import Matcher
from pipeline.engine.outcome import ends_with_stop
from pipeline.engine.sampler import unpack
from pipeline.errors import RowError
from pipeline.kernels.sampling import cut, gumbel_noise, penalise
from pipeline.rows import Completion, Request
from pipeline.tokenizer import Tokenizer

SEED_MASK = (1 << 63) - 1


@dataclass(slots=True, eq=False)
class BatchRow:
    """One request of a batch while it generates."""

    request: Request
    matcher: Matcher | None = None
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: RowError | None = None

    def take(self, token: int, tokenizer: Tokenizer) -> None:
        """Add the next token, or end with it."""
        sampling = self.request.sampling
        if self.error is not None:
            self.finish_reason = "error"
            return
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            self.finish_reason = "stop"
            return
        self.output_ids.append(token)
        if self.matcher is not None:
            self.matcher.accept(token)
        ended = self.matcher is not None and self.matcher.ended
        if ended or (sampling.stop and self._stops(tokenizer)):
            self.finish_reason = "stop"
        elif len(self.output_ids) >= sampling.max_new_tokens:
            self.finish_reason = "length"

    def _stops(self, tokenizer: Tokenizer) -> bool:
        return ends_with_stop(tokenizer, self.output_ids, self.request.sampling.stop)

    def completion(self, num_prompt_tokens: int) -> Completion:
        ids = () if self.error is not None else tuple(self.output_ids)
        reason = self.finish_reason or "length"
        return Completion(self.request.key, ids, reason, num_prompt_tokens, 0, self.error)


class RowSampler:
    """A logits processor: the largest of what it returns is each row's next token."""

    def __init__(self, rows: Sequence[BatchRow], prompts: Tensor, mask: Tensor) -> None:
        self.rows = rows
        self.prompts = prompts
        self.mask = mask.bool()
        self.start: int | None = None  # length of what `generate` began with
        params = [row.request.sampling for row in rows]
        self.random = any(p.temperature > 0 for p in params)
        self.cuts = any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)
        self.penalises = any(p.repetition_penalty != 1.0 for p in params)

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=prompts.device)

        self.temperature = column([p.temperature for p in params], torch.float32)
        self.top_k = column([p.top_k for p in params], torch.int64)
        self.top_p = column([p.top_p for p in params], torch.float32)
        self.min_p = column([p.min_p for p in params], torch.float32)
        self.penalty = column([p.repetition_penalty for p in params], torch.float32)
        self.seeds = column([p.seed & SEED_MASK for p in params], torch.int64)
        self.seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        step = input_ids.shape[1] - self.start
        logits = self._allowed(self._penalised(scores.float(), input_ids, step))
        if not self.random:
            return logits
        cold = self.temperature <= 0
        warm = logits / torch.where(cold, 1.0, self.temperature)[:, None]
        if self.cuts:
            warm = cut(warm, self.top_k, self.top_p, self.min_p)
        steps = torch.full_like(self.seeds, step)
        tokens = torch.arange(logits.shape[1], device=logits.device)[None]
        warm = warm + gumbel_noise(self.seeds, steps, tokens)
        return torch.where(cold[:, None], logits, warm)

    def _penalised(self, logits: Tensor, input_ids: Tensor, step: int) -> Tensor:
        for index, valid in enumerate(torch.isfinite(logits.amax(-1)).tolist()):
            row = self.rows[index]
            if not valid and row.finish_reason is None:
                row.error = RowError("numerical_error")
        if not self.penalises:
            return logits
        if self.seen is None:
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            lane, place = self.mask.nonzero(as_tuple=True)
            self.seen[lane, self.prompts[lane, place].clamp_max(logits.shape[1] - 1)] = True
        if step:
            self.seen.scatter_(1, input_ids[:, -1:], True)
        return penalise(logits, self.seen, self.penalty)

    def _allowed(self, logits: Tensor) -> Tensor:
        """Put -inf where a row's schema excludes a token."""
        for index, row in enumerate(self.rows):
            if row.matcher is not None and row.finish_reason is None:
                bits = row.matcher.mask()[None].to(logits.device)
                allowed = unpack(bits, logits.shape[1])[0]
                logits[index] = logits[index].masked_fill(~allowed, float("-inf"))
        return logits


class RowsDone:
    """A stopping criterion: gives each row its new token and says whether it has ended."""

    def __init__(self, rows: Sequence[BatchRow], tokenizer: Tokenizer) -> None:
        self.rows = rows
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason is None:
                row.take(token, self.tokenizer)
        done = [row.finish_reason is not None for row in self.rows]
        return torch.tensor(done, device=input_ids.device)
