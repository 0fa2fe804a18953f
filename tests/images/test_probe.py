"""The header probe gives the size of the decoded picture, for every format and orientation."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.errors import RowError
from pipeline.image_header import read_header
from pipeline.images import decode, probe
from tests.helpers.pictures import FORMATS, MODES, TURNS, encode, jpeg, official, picture

BIG = 10**9


def _random_file(rng: np.random.Generator) -> bytes:
    format = str(rng.choice(FORMATS))
    mode = str(rng.choice(MODES[format]))
    width, height = (int(n) for n in rng.integers(1, 70, 2))
    orientation = int(rng.integers(0, 9)) if format in TURNS else 0
    options: dict[str, object] = {}
    if format == "JPEG":
        options = {"quality": int(rng.integers(30, 96)), "progressive": bool(rng.integers(2))}
    if format == "WEBP":
        options = {"lossless": bool(rng.integers(2))}
    if format == "TIFF":
        options = {"compression": str(rng.choice(["raw", "tiff_lzw", "tiff_deflate"]))}
    image = picture(width, height, mode, int(rng.integers(1000)))
    return encode(image, format, orientation, **options)


@pytest.mark.parametrize("seed", range(10))
def test_probe_equals_decoded_size_and_official_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):  # 2,000 files in all
        data = _random_file(rng)
        pixels = decode(data, BIG)
        assert probe(data, BIG) == (pixels.shape[1], pixels.shape[0])
        assert np.array_equal(pixels, official(data))


@pytest.mark.parametrize("format", TURNS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(format: str, orientation: int) -> None:
    data = encode(picture(40, 20), format, orientation)
    assert probe(data, BIG) == ((20, 40) if orientation >= 5 else (40, 20))
    assert np.array_equal(decode(data, BIG), official(data))


def test_orientation_in_xmp_counts_where_exif_is_silent() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for format in ("JPEG", "WEBP"):
        data = encode(picture(40, 20), format, xmp=xmp)
        assert probe(data, BIG) == (20, 40)
        assert np.array_equal(decode(data, BIG), official(data))


@pytest.mark.parametrize("zipped", [False, True])
def test_orientation_in_png_text_chunks(zipped: bool) -> None:
    exif = Image.Exif()
    exif[274] = 8
    raw = exif.tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=zipped)
    data = encode(picture(40, 20), "PNG", pnginfo=info)
    assert probe(data, BIG) == (20, 40)
    assert np.array_equal(decode(data, BIG), official(data))
    info = PngImagePlugin.PngInfo()
    info.add_itxt(
        "XML:com.adobe.xmp", "<a tiff:Orientation='1' tiff:Orientation=\"5\"/>", zip=zipped
    )
    data = encode(picture(40, 20), "PNG", pnginfo=info)
    assert probe(data, BIG) == (20, 40)
    assert np.array_equal(decode(data, BIG), official(data))


def test_png_exif_behind_the_pixels() -> None:
    plain, turned = encode(picture(40, 20), "PNG"), encode(picture(40, 20), "PNG", 6)
    at = turned.index(b"eXIf") - 4
    length = int.from_bytes(turned[at : at + 4], "big") + 12
    data = plain[:-12] + turned[at : at + length] + plain[-12:]
    assert probe(data, BIG) == (20, 40)
    assert np.array_equal(decode(data, BIG), official(data))


def test_animations_give_their_first_frame() -> None:
    frames = [picture(30, 20, seed=s) for s in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert probe(data, BIG) == (30, 20)
        assert np.array_equal(decode(data, BIG), official(data))


def test_gif_frame_beyond_its_screen() -> None:
    data = bytearray(encode(picture(30, 20, "P"), "GIF"))
    data[6:10] = (5).to_bytes(2, "little") * 2
    assert probe(bytes(data), BIG) == (30, 20)
    assert decode(bytes(data), BIG).shape == (20, 30, 3)


def test_bmp_from_top_to_bottom_and_of_os2() -> None:
    data = bytearray(encode(picture(6, 4), "BMP"))
    data[22:26] = (-4).to_bytes(4, "little", signed=True)
    assert probe(bytes(data), BIG) == (6, 4)
    assert decode(bytes(data), BIG).shape == (4, 6, 3)
    old = b"BM" + (26 + 16).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little")
    old += (12).to_bytes(4, "little") + b"\2\0\2\0\1\0\x18\0" + bytes(16)
    assert probe(old, BIG) == (2, 2)
    assert decode(old, BIG).shape == (2, 2, 3)


def test_jpeg_with_padding_and_junk_between_segments() -> None:
    data = jpeg(40, 20, orientation=6)
    padded = data[:2] + b"\xff\xff\xff" + data[2:]
    assert probe(padded, BIG) == (20, 40)
    assert np.array_equal(decode(padded, BIG), official(padded))


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for format in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, format)
        pixels = decode(file.getvalue(), BIG)
        assert np.array_equal(pixels[..., 0], values >> 8)


def test_probe_reads_only_the_header() -> None:
    data = jpeg(200, 100)
    cut = data[: data.index(b"\xff\xda") + 2]
    assert probe(cut, BIG) == (200, 100)


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_of_a_file_is_a_row_error_or_a_picture(format: str) -> None:
    data = encode(picture(20, 15), format, 6 if format in TURNS else 0)
    for end in range(0, len(data), max(1, len(data) // 150)):
        assert _outcome(data[:end]) in {
            "ok", "empty_image", "not_an_image", "truncated_image", "corrupt_image",
            "unsupported_format",
        }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bytes_end_in_row_errors_or_pictures(format: str) -> None:
    rng = np.random.default_rng(7)
    data = encode(picture(20, 15), format, 3 if format in TURNS else 0)
    for _ in range(150):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[place] = int(rng.integers(256))
        _outcome(bytes(broken))


def _outcome(data: bytes) -> str:
    """`ok`, or the code of the RowError; a picture that decodes must be as large as probed."""
    try:
        size = probe(data, 10**6)
        pixels = decode(data, 10**6)
    except RowError as error:
        return error.code
    assert size == (pixels.shape[1], pixels.shape[0])
    return "ok"


def test_header_names_the_stored_size() -> None:
    header = read_header(jpeg(40, 20, orientation=6))
    assert (header.format, header.width, header.height, header.orientation) == ("JPEG", 40, 20, 6)
