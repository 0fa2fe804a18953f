"""Where rows come from: one file a format, all behind `base.Source`.

`open_source` imports only the format that the settings name.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

from pipeline.settings import InputSettings
from pipeline.sources.base import InputFile, Source

__all__ = ["InputFile", "Source", "open_source"]

_SOURCES = {  # settings.source -> (module, class)
    "parquet": ("parquet", "ParquetSource"),
    "hf": ("hub", "HubSource"),
    "webdataset": ("webdataset", "WebDatasetSource"),
    "openai": ("openai_batch", "OpenAIBatchSource"),
    "folder": ("folder", "FolderSource"),
}


def open_source(settings: InputSettings, columns: Collection[str] | None = None) -> Source:
    """The source that the settings name. `columns` are those that prompts read; None is all."""
    module, name = _SOURCES[settings.source]
    source: type[Source] = getattr(import_module(f"pipeline.sources.{module}"), name)
    return source(settings, columns)
