"""Finds the labeller: the pipeline's own, or the one that `VLM_BATCH_LABELLER` names.

A stand-in (`package.module:Class` or `path/to/file.py:Class`) has the interface of
`pipeline.labeller.Labeller`; tests use one that needs no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from pipeline.errors import UserError

ENV = "VLM_BATCH_LABELLER"
_MODULE = "vlm_batch_labeller"  # the name under which a file is imported, once


def labeller_class() -> Any:
    """The class to build a labeller from. Raises: UserError."""
    address = os.environ.get(ENV)
    if address is None:
        from pipeline.labeller import Labeller

        return Labeller
    name, _, attribute = address.rpartition(":")
    module = _load_file(name) if name.endswith(".py") else importlib.import_module(name)
    return getattr(module, attribute)


def _load_file(path: str) -> ModuleType:
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UserError(f"{ENV} names {path}, which is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    spec.loader.exec_module(module)
    return module
