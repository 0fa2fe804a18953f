"""Transparency is set on white or dropped, and images without any stay what they were."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.images import decode
from tests.helpers.pictures import encode, official, transparent_files
from tests.hostile.hostile_images import png_chunk, raw_png

BIG = 10**9
FILES = transparent_files()


def pixels(data: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert(mode))


@pytest.mark.parametrize("name", FILES)
def test_white_is_seen_where_the_image_is_clear(name: str) -> None:
    """To one level of the exact mixture; Pillow's own bits are the parity tests' matter."""
    rgba = pixels(FILES[name], "RGBA").astype(np.float64)
    alpha = rgba[..., 3:] / 255
    assert alpha.min() == 0
    made = decode(FILES[name], BIG, "white")
    assert np.abs(made - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (made[alpha[..., 0] == 0] == 255).all()
    opaque = alpha[..., 0] == 1
    assert (made[opaque] == rgba[opaque][:, :3]).all()


@pytest.mark.parametrize("name", FILES)
def test_dropped_alpha_leaves_the_colours(name: str) -> None:
    made = decode(FILES[name], BIG, "drop")
    assert np.array_equal(made, pixels(FILES[name], "RGB"))
    assert not np.array_equal(made, decode(FILES[name], BIG, "white"))


def test_black_text_on_a_clear_ground_can_be_read() -> None:
    image = Image.new("RGBA", (80, 30), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((5, 5), "Total: 42", fill=(0, 0, 0, 255))
    data = encode(image, "PNG")
    read = decode(data, BIG, "white")
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read.min() < 50
    assert decode(data, BIG, "drop").max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_opaque_images_are_the_same_to_the_bit(mode: str) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], -1)).convert(mode)
    format = "TIFF" if mode == "PA" else "PNG"
    absent = {"P": bytes([255] * 256), "L": 255, "RGB": (255, 255, 255)}
    options = {"transparency": absent[mode]} if mode in absent else {}
    data = encode(image, format, **options)
    for how in ("white", "drop"):
        assert np.array_equal(decode(data, BIG, how), official(data))  # type: ignore[arg-type]


def test_a_turned_image_is_turned_after_all() -> None:
    image = Image.open(io.BytesIO(FILES["RGBA"]))
    straight = decode(FILES["RGBA"], BIG, "white")
    turned = decode(encode(image, "PNG", orientation=6), BIG, "white")
    assert np.array_equal(turned, np.rot90(straight, -1))


def test_16_bit_images_are_read_as_before() -> None:
    """Grey keeps its upper byte, colours too; a colour of 16 bits cannot be named in 8."""
    grey = b"\0" + np.array([0, 300, 65535], ">u2").tobytes()
    key = png_chunk(b"tRNS", np.array([300], ">u2").tobytes())
    found = decode(raw_png(3, 1, 16, 0, grey, key), BIG, "white")
    assert found[0, :, 0].tolist() == [0, 1, 255]
    colours = b"\0" + np.array([300, 400, 500, 1000, 2000, 3000], ">u2").tobytes()
    key = png_chunk(b"tRNS", np.array([300, 400, 500], ">u2").tobytes())
    found = decode(raw_png(2, 1, 16, 2, colours, key), BIG, "white")
    assert found[0].tolist() == [[1, 1, 1], [3, 7, 11]]
    clear = b"\0" + np.array([0, 0, 0, 0, 256, 512, 768, 65535], ">u2").tobytes()
    found = decode(raw_png(2, 1, 16, 6, clear), BIG, "white")
    assert found[0].tolist() == [[255, 255, 255], [1, 2, 3]]
