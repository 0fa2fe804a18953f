"""Reads an image's format, size and EXIF orientation from its header, without decoding a pixel.

Knows JPEG, PNG, WebP, GIF, BMP and TIFF, and names many formats that it refuses. Where files
disagree with their format's specification it follows Pillow, since Pillow decodes them later:
a property test holds the two together. Imports the standard library only.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import RowError

_MAX_CHUNKS = 100_000  # of a PNG or WebP file; more than any real file has
_MAX_TEXT = 4 << 20  # inflated bytes of a PNG text chunk
_INT_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}  # TIFF field types
_ORIENTATION, _WIDTH, _HEIGHT = 274, 256, 257  # TIFF tags
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format (Pillow's name), stored size, and the EXIF orientation (1 when there is none)."""

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) after the orientation is applied."""
        if self.orientation in (5, 6, 7, 8):
            return self.height, self.width
        return self.width, self.height


def read_header(data: bytes) -> ImageHeader:
    """The header of an encoded image, or a RowError that says what the bytes are instead."""
    if not data:
        raise RowError("empty_image")
    reader = next((read for magic, read in _READERS if data.startswith(magic)), None)
    if reader is None:
        raise _refusal(data)
    try:
        header = reader(data)
    except (struct.error, IndexError):
        raise RowError("truncated_image", "The image ends inside its header.") from None
    if header.width <= 0 or header.height <= 0:
        raise RowError("corrupt_image", "The image's header gives no size.")
    return header


def _jpeg(data: bytes) -> ImageHeader:
    size: tuple[int, int] | None = None
    exif = xmp = b""
    for marker, start, stop in _jpeg_segments(data):
        body = data[start : min(stop, start + 64)]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width = struct.unpack_from(">BHH", body)
            if precision != 8:
                raise RowError("unsupported_format", f"A JPEG of {precision} bits is unsupported.")
            size = width, height
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += data[start + 6 if exif else start : stop]
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = data[start:stop]
    if size is None:
        raise RowError("corrupt_image", "The JPEG has no frame header.")
    return ImageHeader("JPEG", *size, orientation=_orientation(exif, xmp))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment's body before the first scan."""
    pos = 2
    while True:
        pos = data.find(b"\xff", pos)  # junk between segments is skipped, as Pillow does
        if pos < 0:
            raise RowError("truncated_image", "The JPEG ends before its picture starts.")
        marker = data[pos + 1]
        if marker == 0xFF:
            pos += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:
            pos += 2
        elif marker == 0xDA:
            return
        else:
            stop = pos + 2 + struct.unpack_from(">H", data, pos + 2)[0]
            if stop > len(data):
                raise RowError("truncated_image", "The JPEG ends inside its header.")
            yield marker, pos + 4, stop
            pos = stop


def _png(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise RowError("corrupt_image", "The PNG does not begin with its header.")
    width, height = struct.unpack_from(">II", data, 16)
    exif = xmp = raw = b""
    for kind, start, stop in _png_chunks(data):
        if kind == b"eXIf":
            exif = data[start:stop]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key, text = _png_text(kind, data[start : min(stop, start + _MAX_TEXT)])
            if key == b"Raw profile type exif":
                raw = text
            elif key == b"XML:com.adobe.xmp":
                xmp = text
    if not exif and raw:
        exif = _raw_profile(raw)
    return ImageHeader("PNG", width, height, orientation=_orientation(exif, xmp))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    pos = 8
    for _ in range(_MAX_CHUNKS):
        if pos + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, pos)
        if kind == b"IEND":
            return
        yield kind, pos + 8, pos + 8 + length
        pos += length + 12


def _png_text(kind: bytes, chunk: bytes) -> tuple[bytes, bytes]:
    """(keyword, text) of a text chunk; only the two keywords that can turn the image."""
    key, _, rest = chunk.partition(b"\0")
    if key not in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
        return b"", b""
    compressed = kind == b"zTXt"
    if compressed:
        rest = rest[1:]
    elif kind == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    if compressed:
        try:
            rest = zlib.decompressobj().decompress(rest, _MAX_TEXT)
        except zlib.error:
            return b"", b""
    return key, rest


def _raw_profile(text: bytes) -> bytes:
    """The EXIF bytes that ImageMagick writes as hexadecimal lines into a text chunk."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if data[8:12] != b"WEBP":
        raise _refusal(data)
    if kind == b"VP8X":
        flags = data[20]
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        exif, xmp = _webp_metadata(data, flags)
        return ImageHeader("WEBP", width, height, orientation=_orientation(exif, xmp))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    raise RowError("corrupt_image", "The WebP file has no picture.")


def _webp_metadata(data: bytes, flags: int) -> tuple[bytes, bytes]:
    """The EXIF and XMP chunks, each only when the header's flag announces it."""
    found = {b"EXIF": b"", b"XMP ": b""}
    pos = 12
    for _ in range(_MAX_CHUNKS):
        if pos + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, pos)
        if kind in found and not found[kind]:
            found[kind] = data[pos + 8 : pos + 8 + length]
        pos += 8 + length + (length & 1)
    return found[b"EXIF"] if flags & 8 else b"", found[b"XMP "] if flags & 4 else b""


def _gif(data: bytes) -> ImageHeader:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    pos = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        block = data[pos]
        if block == 0x2C:  # the first frame, which may reach beyond the screen
            left, top, wide, high = struct.unpack_from("<HHHH", data, pos + 1)
            return ImageHeader("GIF", max(width, left + wide), max(height, top + high))
        if block == 0x3B:
            raise RowError("corrupt_image", "The GIF has no frame.")
        pos += 1
        if block == 0x21:
            pos += 1
            while data[pos]:
                pos += data[pos] + 1
            pos += 1


def _bmp(data: bytes) -> ImageHeader:
    header_size = struct.unpack_from("<I", data, 14)[0]
    if header_size == 12:
        return ImageHeader("BMP", *struct.unpack_from("<HH", data, 18))
    if header_size not in (40, 52, 56, 64, 108, 124):
        raise RowError("unsupported_format", "The BMP file has an unknown header.")
    width, height = struct.unpack_from("<Ii", data, 18)
    return ImageHeader("BMP", width, abs(height))


def _tiff(data: bytes) -> ImageHeader:
    tags = _tiff_tags(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise RowError("corrupt_image", "The TIFF file gives no size.")
    orientation = tags.get(_ORIENTATION, 1)
    return ImageHeader(
        "TIFF", tags[_WIDTH], tags[_HEIGHT], orientation if 1 <= orientation <= 8 else 1
    )


def _tiff_tags(data: bytes) -> dict[int, int]:
    """The three tags of interest in the first directory of a TIFF or BigTIFF file."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    pos = start + (8 if big else 2)
    tags: dict[int, int] = {}
    for _ in range(min(count, 4096)):
        tag, kind = struct.unpack_from(order + "HH", data, pos)
        number = struct.unpack_from(order + ("Q" if big else "I"), data, pos + 4)[0]
        if tag in (_ORIENTATION, _WIDTH, _HEIGHT) and number == 1 and kind in _INT_TYPES:
            value_pos = pos + (12 if big else 8)
            tags[tag] = struct.unpack_from(order + _INT_TYPES[kind], data, value_pos)[0]
        pos += 20 if big else 12
    return tags


def _orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8; EXIF wins, XMP speaks when EXIF is silent, as in `PIL.ImageOps.exif_transpose`."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    value: int | None = None
    if exif[:4] in (b"II*\0", b"MM\0*"):
        try:
            value = _tiff_tags(exif).get(_ORIENTATION)
        except struct.error:
            value = None
    if value is None and (match := _XMP_ORIENTATION.search(xmp)):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


_READERS: tuple[tuple[bytes, Callable[[bytes], ImageHeader]], ...] = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"RIFF", _webp),
    (b"GIF87a", _gif),
    (b"GIF89a", _gif),
    (b"BM", _bmp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
    (b"II+\0", _tiff),
    (b"MM\0+", _tiff),
)

_UNSUPPORTED: tuple[tuple[bytes, str], ...] = (
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"\x1a\x45\xdf\xa3", "Matroska"),
    (b"RIFF", "RIFF, but not WebP"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
)
_FTYP = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC"}


def _refusal(data: bytes) -> RowError:
    """The error that names what the bytes seem to be."""
    if data[4:8] == b"ftyp":
        brands = data[8 : 8 + 64]
        known = {name for mark, name in _FTYP.items() if mark in brands}
        return _unsupported("AVIF" if "AVIF" in known else "HEIC" if known else "MP4")
    for magic, name in _UNSUPPORTED:
        if data.startswith(magic):
            return _unsupported(name)
    if re.match(rb"P[1-7]\s", data):
        return _unsupported("Netpbm")
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return _unsupported("SVG")
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return RowError("not_an_image", "The bytes are an HTML page, not an image.")
    return RowError("not_an_image")


def _unsupported(name: str) -> RowError:
    return RowError(
        "unsupported_format",
        f"The image's format is {name}; supported are JPEG, PNG, WebP, GIF, BMP and TIFF.",
    )
