"""LLaVA-NeXT on stronger language models: Qwen1.5 (72B, 110B) and Llama 3 (8B).

As LLaVA 1.6 but for template and vocabulary, which `spec.py` chooses. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava.config import row_of
from pipeline.models.families.llava.spec import Llava
from pipeline.settings import ModelSettings


def matches(config: Mapping[str, Any]) -> bool:
    """True for a LLaVA-NeXT checkpoint on Qwen or Llama 3."""
    return row_of(config) == "llava-next"


def build(checkpoint: Checkpoint, settings: ModelSettings) -> LlavaNext:
    return LlavaNext(checkpoint, settings)


class LlavaNext(Llava):
    """A LLaVA-NeXT checkpoint without its weights."""

    name = "llava-next"
