"""Image files that are broken, huge, odd or no images, with the code that each must end in.

`ok` means that the picture is decoded. Used by `make_corpus`.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from tests.helpers.pictures import encode, jpeg, picture

Case = tuple[str, bytes | None, str]  # name, content, expected code


def image_cases() -> list[Case]:
    """All of them."""
    return [*_good(), *_truncated(), *_too_large(), *_corrupt(), *_foreign()]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def raw_png(
    width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG file from its parts; `rows` are uncompressed scanlines."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra
        + png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")
    )  # fmt: skip


def _good() -> list[Case]:
    frames = [picture(40, 30, seed=s) for s in range(3)]
    palette = picture(40, 30, "P")
    palette.info["transparency"] = bytes(range(256))
    deep = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    broken_exif = Image.Exif()
    broken_exif[274] = 77
    wide = b"".join(b"\0" + bytes(range(12)) * 20 for _ in range(30))  # 40 RGB pixels of 16 bits
    many = {"save_all": True, "append_images": frames[1:]}
    return [
        ("plain_jpeg", jpeg(), "ok"),
        ("progressive_jpeg", encode(frames[0], "JPEG", progressive=True), "ok"),
        ("grey_jpeg", encode(picture(40, 30, "L"), "JPEG"), "ok"),
        ("cmyk_jpeg", encode(picture(40, 30, "CMYK"), "JPEG"), "ok"),
        ("cmyk_tiff", encode(picture(40, 30, "CMYK"), "TIFF"), "ok"),
        ("grey_png_of_16_bits", encode(Image.fromarray(deep), "PNG"), "ok"),
        ("rgb_png_of_16_bits", raw_png(40, 30, 16, 2, wide), "ok"),
        ("palette_png", encode(palette, "PNG"), "ok"),
        ("transparent_png", encode(picture(40, 30, "RGBA"), "PNG"), "ok"),
        ("one_bit_png", encode(picture(40, 30, "1"), "PNG"), "ok"),
        ("animated_gif", encode(frames[0], "GIF", **many), "ok"),
        ("animated_webp", encode(frames[0], "WEBP", **many), "ok"),
        ("animated_png", encode(frames[0], "PNG", **many), "ok"),
        ("many_page_tiff", encode(frames[0], "TIFF", **many), "ok"),
        ("exif_rotated_jpeg", jpeg(64, 48, orientation=6), "ok"),
        ("exif_mirrored_webp", encode(frames[0], "WEBP", 5), "ok"),
        ("exif_rotated_tiff", encode(frames[0], "TIFF", 8), "ok"),
        ("exif_orientation_of_77", encode(frames[0], "JPEG", exif=broken_exif), "ok"),
        ("exif_of_noise", encode(frames[0], "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40), "ok"),
        ("one_pixel", encode(picture(1, 1), "PNG"), "ok"),
        ("jpeg_with_zip_behind", jpeg() + b"PK\x03\x04" + bytes(200), "ok"),
        ("gif_that_is_javascript", _javascript_gif(), "ok"),
        ("jpeg_without_end_marker", jpeg()[:-2], "truncated_image"),
    ]


def _javascript_gif() -> bytes:
    """A GIF whose comment and trailer make it a script too."""
    data = encode(picture(40, 30, "P"), "GIF")
    return data[:-1] + b"\x21\xfe\x0b*/=1;alert()\x00"[:15] + b"\x00\x3b*/=1//"


def _truncated() -> list[Case]:
    cases: list[Case] = []
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(picture(200, 150, "RGB", 3), format)
        cases.append((f"half_a_{format.lower()}", data[: len(data) // 2], "truncated_image"))
    data = jpeg()
    cases.append(("jpeg_header_only", data[: data.index(b"\xff\xda")], "truncated_image"))
    cases.append(("three_bytes_of_jpeg", data[:3], "truncated_image"))
    cases.append(("zero_bytes", b"", "empty_image"))
    cases.append(("null", None, "missing_image"))
    return cases


def _too_large() -> list[Case]:
    bomb = raw_png(30_000, 30_000, 1, 0, bytes(30_000 * 3751))
    headline = raw_png(20_000, 20_000, 8, 2, bytes(100))
    huge_jpeg = bytearray(jpeg())
    at = huge_jpeg.index(b"\xff\xc0") + 5
    huge_jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    huge_gif = bytearray(encode(picture(40, 30, "P"), "GIF"))
    huge_gif[6:10] = b"\xff\xff\xff\xff"
    huge_webp = bytearray(encode(picture(40, 30), "WEBP", 1))
    huge_webp[24:30] = b"\xff\xff\xff\xff\xff\xff"
    huge_bmp = bytearray(encode(picture(40, 30), "BMP"))
    huge_bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    huge_tiff = bytearray(encode(picture(40, 30), "TIFF"))
    huge_tiff[:] = _tiff([(256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1)])
    return [
        ("decompression_bomb", bomb, "image_too_large"),
        ("header_of_400_megapixels", headline, "image_too_large"),
        ("header_of_4_gigapixels_jpeg", bytes(huge_jpeg), "image_too_large"),
        ("header_of_4_gigapixels_gif", bytes(huge_gif), "image_too_large"),
        ("header_of_2_to_48_pixels_webp", bytes(huge_webp), "image_too_large"),
        ("header_of_2_to_62_pixels_bmp", bytes(huge_bmp), "image_too_large"),
        ("header_of_2_to_64_pixels_tiff", bytes(huge_tiff), "image_too_large"),
        ("one_by_20000", encode(picture(1, 20_000), "PNG"), "bad_aspect_ratio"),
        ("20000_by_one", encode(picture(20_000, 1), "PNG"), "bad_aspect_ratio"),
    ]


def _corrupt() -> list[Case]:
    plain = encode(picture(40, 30), "PNG")
    bad_sum = plain[:50] + bytes([plain[50] ^ 0xFF]) + plain[51:]
    no_frame = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xda\x00\x02" + bytes(50)
    lossless = jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1)
    gif = encode(picture(40, 30, "P"), "GIF")
    webp = encode(picture(40, 30), "WEBP")
    noise = np.random.default_rng(5).bytes(3000)
    bomb = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80 << 20), 9))
    rows = b"".join(b"\0" + bytes(40) for _ in range(30))
    return [
        ("png_with_wrong_checksum", bad_sum, "corrupt_image"),
        ("png_of_zero_width", raw_png(0, 30, 8, 0, bytes(30)), "corrupt_image"),
        ("png_without_header", plain[:8] + png_chunk(b"IEND", b""), "corrupt_image"),
        ("png_with_bomb_in_its_profile", raw_png(40, 30, 8, 0, rows, bomb), "corrupt_image"),
        ("png_of_unknown_color_type", raw_png(40, 30, 8, 5, rows), "corrupt_image"),
        ("jpeg_without_frame", no_frame, "corrupt_image"),
        ("jpeg_lossless", lossless, "corrupt_image"),
        ("gif_without_frame", gif[:13] + b"\x3b" if not gif[10] & 0x80 else _no_frame(gif),
         "corrupt_image"),
        ("webp_of_noise", webp[:30] + noise, "corrupt_image"),
        ("tiff_without_size", _tiff([(258, 3, 1, 8)]), "corrupt_image"),
        ("tiff_of_noise_behind_header", b"II*\0\x08\0\0\0" + noise[:7], "truncated_image"),
        ("tiff_directory_far_away", b"II*\0\xff\xff\xff\x7f", "truncated_image"),
    ]  # fmt: skip


def _no_frame(gif: bytes) -> bytes:
    return gif[: 13 + (3 << (gif[10] & 7) + 1)] + b"\x3b"


def _tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    """A TIFF file with nothing but a directory, which is its own successor."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 8)


def _foreign() -> list[Case]:
    floats = Image.fromarray(np.zeros((30, 40), np.float32))
    integers = Image.fromarray(np.zeros((30, 40), np.int32))
    twelve = jpeg().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1)
    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
    entity = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]><svg/>'
    unsupported = {
        "svg": svg,
        "svg_with_entity": entity,
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "heif_of_mif1": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100),
        "avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100),
        "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(100),
        "jpeg2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "jpeg_xl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100),
        "photoshop": b"8BPS\0\1" + bytes(100),
        "icon": b"\0\0\1\0\1\0" + bytes(100),
        "netpbm": b"P6\n40 30\n255\n" + bytes(3600),
        "pdf_that_is_a_jpeg_too": b"%PDF-1.4\n" + jpeg(),
        "wave_sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        "zip": b"PK\x03\x04" + bytes(100),
        "jpeg_of_12_bits": twelve,
        "tiff_of_floats": encode(floats, "TIFF"),
        "tiff_of_32_bit_integers": encode(integers, "TIFF"),
    }
    nothing = {
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "html_with_space_before": b"\xef\xbb\xbf\n  <HTML><head></head></HTML>",
        "json_error": b'{"error": "not found"}',
        "text": "Kein Bild, nur Wörter.".encode(),
        "one_byte": b"\xff",
        "zeros": bytes(1000),
        "executable": b"\x7fELF" + bytes(100),
        "pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.",
    }
    return [
        *((name, data, "unsupported_format") for name, data in unsupported.items()),
        *((name, data, "not_an_image") for name, data in nothing.items()),
    ]
