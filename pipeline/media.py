"""The encoded bytes of whatever a row names: an image, a video or a recording.

All are read by the rules of `images.load`; limits and error codes are each kind's own. Decodes
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import images
from pipeline.errors import RowError
from pipeline.rows import ImageRef

if TYPE_CHECKING:
    from pipeline.settings import InputSettings

_CODES = {  # what an image's errors are called of the other kinds
    "video": {
        "empty_image": "empty_video",
        "missing_image": "missing_video",
        "not_an_image": "not_a_video",
        "corrupt_image": "video_unreadable",
    },
    "audio": {
        "empty_image": "empty_audio",
        "missing_image": "missing_audio",
        "not_an_image": "not_audio",
        "corrupt_image": "corrupt_audio",
    },
}


def load(ref: ImageRef, settings: InputSettings) -> bytes:
    """The encoded bytes. Raises: RowError."""
    if ref.kind == "video":
        return _load_as(ref, settings, "video", settings.max_video_bytes)
    if ref.kind == "audio":
        return _load_as(ref, settings, "recording", settings.max_audio_bytes)
    return images.load(ref, settings)


def _load_as(ref: ImageRef, settings: InputSettings, noun: str, max_bytes: int) -> bytes:
    codes = _CODES[ref.kind]
    if not ref.data and not ref.path:
        raise RowError(codes["empty_image" if ref.data is not None else "missing_image"])
    try:
        return images.load(ref, settings.model_copy(update={"max_bytes": max_bytes}))
    except RowError as error:
        if error.code == "file_too_large":
            message = f"The {noun} has more than {max_bytes} bytes."
            raise RowError(error.code, message) from None
        if error.code in codes:
            raise RowError(codes[error.code]) from None
        raise
