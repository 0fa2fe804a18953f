"""Settings of an image processor that all families make alike, and a refusal of any others.

A preprocessor_config.json may ask for steps, filters and sizes that a family does not make; silence
would be other pixels than transformers'. Knows no family. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint

LANCZOS, BICUBIC = 1, 3  # Pillow's numbers of the filters
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_SCALE = 1 / 255


def check_steps(checkpoint: Checkpoint, *filters: int, videos: bool = False) -> None:
    """Refuse a processor that leaves a step out, or resizes by none of `filters`, if there are any.

    Of `videos`, the processor of its own.
    """
    processor = checkpoint.video_preprocessor_config if videos else checkpoint.preprocessor_config
    for step in _STEPS:
        if not processor.get(step, True):
            raise refusal(checkpoint, step, processor[step])
    factor = processor.get("rescale_factor")
    if factor is not None and abs(float(factor) - _SCALE) > 1e-7:
        raise refusal(checkpoint, "rescale_factor", factor)
    for key in ("image_mean", "image_std"):
        if processor.get(key) and not _three_numbers(processor[key]):
            raise refusal(checkpoint, key, processor[key])
    resample = processor.get("resample")
    if filters and resample is not None and resample not in filters:
        raise refusal(checkpoint, "resample", resample)


def _three_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else []
    return len(numbers) == 3 and all(isinstance(number, int | float) for number in numbers)


def check_size(checkpoint: Checkpoint, key: str, expected: int) -> None:
    """Refuse a size but one number, or height and width, or the shortest edge, as `expected`."""
    given = checkpoint.preprocessor_config.get(key)
    if given is None:
        return
    numbers = sides(given, "height", "width")
    known = numbers.keys() in ({"height", "width"}, {"shortest_edge"})
    if not known or set(numbers.values()) != {expected}:
        raise refusal(checkpoint, key, given)


def sides(size: Any, *names: str) -> dict[str, Any]:
    """A size's numbers by the names of its sides; one number alone is that of all `names`."""
    named = size if isinstance(size, Mapping) else dict.fromkeys(names, size)
    return {name: number for name, number in named.items() if number is not None}


def longest_edge(checkpoint: Checkpoint, key: str, default: int) -> int:
    """The size `key`, which must tell its longest edge where it is there."""
    size = checkpoint.preprocessor_config.get(key)
    if size is None:
        return default
    if not isinstance(size, Mapping) or not size.get("longest_edge"):
        raise refusal(checkpoint, key, size)
    return int(size["longest_edge"])


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """The colour that is nothing once pixels are normalised, rounded down as the processors do."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def refusal(checkpoint: Checkpoint, key: str, value: Any) -> UserError:
    return UserError(
        f"model.id {checkpoint.id!r}: {key} {value!r} in its preprocessor_config.json is not"
        " supported for this model"
    )
