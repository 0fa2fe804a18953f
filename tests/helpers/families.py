"""The family of a checkpoint as the registry finds it, for tests that need no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.registry import family_for
from pipeline.settings import ModelSettings

F = TypeVar("F", bound=Family)


def found_family(kind: type[F], folder: Path, **options: Any) -> F:
    """Of the folder under these settings of the model; fails unless it is of the kind."""
    settings = ModelSettings(id=str(folder), **options)
    family = family_for(Checkpoint.open(settings), settings)
    assert isinstance(family, kind)
    return family
