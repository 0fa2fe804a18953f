"""What a drawn token means for its sequence: go on, or end, and why.

Stop tokens and lengths were judged on the device; stop strings and schemas are judged here. Knows
the tokenizer, no lane and no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from pipeline.engine.guided import Grammars
from pipeline.engine.sequence import Sequence
from pipeline.errors import RowError
from pipeline.kernels.lanes import LENGTH, NUMERICAL, STOPPED
from pipeline.rows import Completion
from pipeline.tokenizer import Tokenizer

TAIL_TOKENS = 32  # at least so many are decoded again at each step to look for a stop string


class Outcomes:
    """Judges tokens of sequences; `grammars` is made when the first schema comes."""

    def __init__(self, tokenizer: Tokenizer, make_grammars: Callable[[], Grammars]) -> None:
        self.tokenizer = tokenizer
        self._make_grammars = make_grammars
        self._grammars: Grammars | None = None

    def begin(self, sequence: Sequence) -> None:
        """Give the sequence its grammar. A schema was checked when the job started."""
        if sequence.request.schema is None:
            return
        if self._grammars is None:
            self._grammars = self._make_grammars()
        sequence.grammar = self._grammars.matcher(sequence.request.schema)

    def mask(self, sequence: Sequence) -> Tensor | None:
        return None if sequence.grammar is None else sequence.grammar.mask()

    def take(self, sequence: Sequence, token: int, state: int) -> Completion | None:
        """Add the token; the completion if the sequence ends with it."""
        if state == NUMERICAL:
            return sequence.completion("error", RowError("numerical_error"))
        if state == STOPPED:
            return sequence.completion("stop")
        sequence.output_ids.append(token)
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
            if sequence.grammar.ended:
                return sequence.completion("stop")
        if sequence.request.sampling.stop and self._stops(sequence):
            return sequence.completion("stop")
        return sequence.completion("length") if state == LENGTH else None

    def _stops(self, sequence: Sequence) -> bool:
        return ends_with_stop(self.tokenizer, sequence.output_ids, sequence.request.sampling.stop)


def ends_with_stop(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> bool:
    """Whether a stop string stands in the last tokens; one may take a token for each byte."""
    text = tokenizer.decode(ids[-max(TAIL_TOKENS, *map(_max_tokens, stops)) :])
    return any(stop in text for stop in stops)


@lru_cache
def _max_tokens(stop: str) -> int:
    return len(stop.encode()) + 4
