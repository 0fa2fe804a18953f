"""Keys of preprocessor_config.json that every image processor heeds and no family of ours varies.

A file that asks for something else is refused, as its model would see other pixels. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

_STEPS = ("do_resize", "do_rescale", "do_normalize")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def check_processor(processor: Mapping[str, Any], filter: str | None = None) -> None:
    """Raises UserError where a step is off, pixels are scaled otherwise, or not by `filter`."""
    for step in _STEPS:
        if processor.get(step) is False:
            raise UserError(f"preprocessor_config.json says {step}: false, which is not supported")
    scale = processor.get("rescale_factor")
    if scale is not None and abs(float(scale) * 255 - 1) > 1e-4:
        raise UserError(f"preprocessor_config.json says rescale_factor {scale}; supported: 1/255")
    given = processor.get("resample")
    if filter is not None and given is not None and _FILTERS.get(given) != filter:
        raise UserError(f"preprocessor_config.json says resample {given}; supported: {filter}")
