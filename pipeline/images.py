"""From an image reference to its bytes, from bytes to a size, and from bytes to RGB pixels.

`load` and `probe` run in the preparing process, `decode` in the feeder's worker processes. Every
problem is a RowError with a code of `errors.CODES`. Knows no model and no row. Imports no torch.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from pipeline.errors import RowError
from pipeline.image_header import ImageHeader, read_header
from pipeline.stores import read_whole

if TYPE_CHECKING:
    from pipeline.rows import ImageRef
    from pipeline.settings import InputSettings

Transparency = Literal["white", "drop"]  # set on white; alpha left away

# What a row may name besides local files. Chained addresses (a::b) are refused, and http only
# goes through `urls`, so that no row can reach a protocol that the limits do not cover.
STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oci", "oss", "memory"}
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_pillow = threading.Lock()


def load(ref: ImageRef, settings: InputSettings) -> bytes:
    """The encoded bytes of an image, at most `settings.max_bytes` of them."""
    data = ref.data if ref.data is not None else _read(ref.path or "", settings)
    if not data:
        raise RowError("empty_image")
    return _limited(data, settings.max_bytes)


def probe(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) that `decode` will give, from the header alone."""
    header = read_header(data)
    _check_pixels(header, max_pixels)
    return header.size


def decode(data: bytes, max_pixels: int, transparency: Transparency = "white") -> np.ndarray:
    """uint8 RGB [height, width, 3] of the first frame, turned as EXIF says."""
    return np.array(decode_image(data, max_pixels, transparency))


def decode_image(data: bytes, max_pixels: int, transparency: Transparency = "white") -> Image.Image:
    """As `decode`, as a Pillow image of mode RGB."""
    header = read_header(data)
    _check_pixels(header, max_pixels)
    with _quiet_pillow():
        try:
            image = _open(data, header, transparency)
        except RowError:
            raise
        except MemoryError:
            raise RowError("image_too_large", "The image does not fit the memory.") from None
        except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError and more
            raise _decode_error(data, header, error) from None
    if image.size != header.size:
        raise RowError("corrupt_image", "The image's size differs from its header's.")
    return image


def _open(data: bytes, header: ImageHeader, transparency: Transparency) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=(header.format,)) as opened:
        opened.load()
        image = _to_rgb(opened, transparency)
    if header.format != "TIFF" and header.orientation in _TRANSPOSE:  # Pillow turns TIFF itself
        image = image.transpose(_TRANSPOSE[header.orientation])
    return image


def _to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    """Pillow's `convert("RGB")`; 16-bit grey keeps its upper byte, since Pillow would clip it."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise RowError("unsupported_format", "Images with 32 bits a sample are unsupported.")
    if transparency == "white" and _may_be_transparent(image):
        return _on_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _may_be_transparent(image: Image.Image) -> bool:
    """Whether there is an alpha band, or a colour or palette entries are named transparent."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of an RGBA image; most are opaque, and then its colours are the answer already."""
    if image.getchannel("A").getextrema() != (255, 255):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _check_pixels(header: ImageHeader, max_pixels: int) -> None:
    if header.width * header.height > max_pixels:
        raise RowError(
            "image_too_large",
            f"The image has {header.width} x {header.height} pixels, more than {max_pixels}.",
        )


def _decode_error(data: bytes, header: ImageHeader, error: Exception) -> RowError:
    text = str(error).lower()
    short = header.format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if short or "truncated" in text or "not enough" in text or "unexpected end" in text:
        return RowError("truncated_image")
    return RowError("corrupt_image", f"The image cannot be decoded: {error}.")


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warnings, and no pixel limit of Pillow's own: `max_pixels` was checked already."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(path: str, settings: InputSettings) -> bytes:
    scheme = path.partition(":")[0].lower() if ":" in path else ""
    if scheme == "data":
        return _data_url(path, settings.max_bytes)
    if scheme in ("http", "https"):
        return _fetch(path, settings)
    if not path:
        raise RowError("missing_image", "The image's path is empty.")
    path = _resolve(path, settings.base_path)
    if "://" not in path:
        return _read_local(path, settings.max_bytes)
    return _read_store(path, settings.max_bytes)


def _fetch(url: str, settings: InputSettings) -> bytes:
    if not settings.remote:
        raise RowError("remote_disabled")
    from pipeline.urls import fetch

    return fetch(url, settings.remote_timeout_sec, settings.max_bytes)


def _data_url(url: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise RowError("not_an_image", "The data URL has no data.")
    if len(body) > max_bytes * 4 // 3 + 4:
        raise _too_large(max_bytes)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote_to_bytes(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError):
        raise RowError("corrupt_image", "The data URL is no valid base64.") from None


def _resolve(path: str, base: str | None) -> str:
    if path.startswith("file://"):
        path = path[len("file://") :]
    if base and "://" not in path and not os.path.isabs(path):
        return base.rstrip("/") + "/" + path
    return path


def _read_local(path: str, max_bytes: int) -> bytes:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # a pipe or device would never end
            raise RowError("missing_file", f"{_short(path)} is no regular file.")
        if info.st_size > max_bytes:
            raise _too_large(max_bytes)
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError("missing_file", f"{_short(path)} cannot be read: {reason}.") from None


def _read_store(path: str, max_bytes: int) -> bytes:
    scheme = path.partition("://")[0].lower()
    if "::" in path or scheme not in STORES:
        raise RowError(
            "remote_forbidden", f"Images cannot be read from {_short(scheme)} addresses."
        )
    try:
        data = read_whole(path, max_bytes)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise RowError("missing_file", f"{_short(path)} does not exist.") from None
    except (OSError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise RowError("remote_failed", f"{_short(path)} cannot be read: {reason}.") from None
    if data is None:
        raise _too_large(max_bytes)
    return data


def _limited(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def _too_large(max_bytes: int) -> RowError:
    return RowError("file_too_large", f"The image has more than {max_bytes} bytes.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")
