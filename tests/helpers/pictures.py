"""Small pictures in every format and mode, made from a seed; and what Pillow makes of them."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "RGB"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA"),
}
TURNS = ("JPEG", "PNG", "WEBP", "TIFF")  # formats that carry an EXIF orientation


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(
    image: Image.Image, format: str = "JPEG", orientation: int = 0, **options: object
) -> bytes:
    """The picture's file; `orientation` 1 to 8 is written as EXIF."""
    if orientation:
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(width: int = 64, height: int = 48, seed: int = 0, orientation: int = 0) -> bytes:
    """A small JPEG file."""
    return encode(picture(width, height, seed=seed), "JPEG", orientation)


def transparent_files() -> dict[str, bytes]:
    """Files of one size whose transparency stands in a band, a palette or a named colour."""
    values = np.random.default_rng(7).integers(0, 256, (43, 61, 4), dtype=np.uint8)
    values[10:30, 15:45] = 30, 60, 90, 0
    noise = Image.fromarray(values)
    colours, grey = noise.convert("RGB"), noise.convert("L")
    palette, bits = colours.convert("P"), grey.convert("1", dither=Image.Dither.NONE)

    def named(image: Image.Image) -> bytes:
        return encode(image, "PNG", transparency=image.getpixel((30, 20)))

    return {
        "RGBA": encode(noise, "PNG"),
        "LA": encode(noise.convert("LA"), "PNG"),
        "P, an alpha each": encode(palette, "PNG", transparency=bytes(range(256))),
        "P, one entry": named(palette),
        "L, one grey": named(grey),
        "RGB, one colour": named(colours),
        "1, black": named(bits),
        "GIF": encode(palette, "GIF", transparency=palette.getpixel((30, 20))),
        "WebP": encode(noise, "WEBP", lossless=True, exact=True),
        "TIFF": encode(noise, "TIFF"),
    }


def official(data: bytes) -> np.ndarray:
    """The pixels as transformers' `load_image` gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        return np.asarray(image.convert("RGB"))
