"""Image references become bytes, within limits, or a RowError that says why not."""

from __future__ import annotations

import base64
import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from pipeline import images, urls
from pipeline.errors import RowError
from pipeline.rows import ImageRef
from pipeline.settings import InputSettings
from tests.helpers.pictures import encode, jpeg, picture

PICTURE = jpeg(16, 12)


def load(path: str | None = None, data: bytes | None = None, **settings: object) -> bytes:
    return images.load(ImageRef(data, path), InputSettings(path="x", **settings))


def code_of(path: str | None = None, data: bytes | None = None, **settings: object) -> str:
    with pytest.raises(RowError) as raised:
        load(path, data, **settings)
    return raised.value.code


def test_bytes_files_and_addresses(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a b.jpg").write_bytes(PICTURE)
    fsspec.filesystem("memory").pipe_file("/load/a.jpg", PICTURE)
    assert load(data=PICTURE) == PICTURE
    assert load(f"{tmp_path}/a b.jpg") == PICTURE
    assert load(f"file://{tmp_path}/a b.jpg") == PICTURE
    assert load("a b.jpg", base_path=str(tmp_path)) == PICTURE
    assert load(f"{tmp_path}/a b.jpg", base_path="/elsewhere") == PICTURE
    assert load("memory://load/a.jpg") == PICTURE
    assert load("a.jpg", base_path="memory://load/") == PICTURE


def test_data_urls() -> None:
    text = base64.b64encode(PICTURE).decode()
    assert load(f"data:image/jpeg;base64,{text}") == PICTURE
    assert load(f"data:image/jpeg;base64,{text.replace('=', '%3D')}") == PICTURE
    assert load("data:,%FF%D8") == b"\xff\xd8"
    assert code_of("data:image/jpeg;base64,@@@") == "corrupt_image"
    assert code_of("data:image/jpeg;base64") == "not_an_image"
    assert code_of(f"data:image/jpeg;base64,{text}", max_bytes=100) == "file_too_large"


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(101))
    (tmp_path / "none").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert code_of(f"{tmp_path}/nothing.jpg") == "missing_file"
    assert code_of(str(tmp_path)) == "missing_file"
    assert code_of(f"{tmp_path}/pipe") == "missing_file"
    assert code_of(f"{tmp_path}/loop") == "missing_file"
    assert code_of("/dev/zero") == "missing_file"
    assert code_of("nul\0l.jpg") == "missing_file"
    assert code_of("x" * 5000) == "missing_file"
    assert code_of("") == "missing_image"
    assert code_of(f"{tmp_path}/big", max_bytes=100) == "file_too_large"
    assert code_of(data=bytes(101), max_bytes=100) == "file_too_large"
    assert code_of(f"{tmp_path}/none") == "empty_image"
    assert code_of(data=b"") == "empty_image"
    assert code_of("memory://load/nothing.jpg") == "missing_file"


def test_remote_addresses_are_off_by_default() -> None:
    for url in ("http://example.com/a.jpg", "HTTPS://example.com/a.jpg"):
        assert code_of(url) == "remote_disabled"


def test_no_other_protocol_passes_the_limits() -> None:
    for url in (
        "ftp://example.com/a.jpg", "sftp://h/a.jpg", "simplecache::http://127.0.0.1/a.jpg",
        "zip://a.jpg::http://127.0.0.1/x.zip", "github://o:r@/a.jpg", "local://x",
        "memory://a::http://127.0.0.1/", "reference://x", "smb://h/a.jpg",
    ):  # fmt: skip
        assert code_of(url, remote=True) in {"remote_forbidden", "missing_file"}, url


def test_remote_addresses_pass_their_limits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, timeout_sec: float, max_bytes: int) -> bytes:
        asked.append((url, timeout_sec, max_bytes))
        return PICTURE

    monkeypatch.setattr(urls, "fetch", fetch)
    assert load("http://e.com/a", remote=True, remote_timeout_sec=3, max_bytes=9999) == PICTURE
    assert asked == [("http://e.com/a", 3.0, 9999)]


def test_pixel_limits_hold_before_a_pixel_is_decoded() -> None:
    data = encode(picture(200, 100), "PNG")
    assert images.probe(data, 20_000) == (200, 100)
    for check in (images.probe, images.decode):
        with pytest.raises(RowError) as raised:
            check(data, 19_999)
        assert raised.value.code == "image_too_large"


def test_pillows_own_limit_neither_warns_nor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(picture(40, 30), format)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert images.decode(data, 10**9).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for format in ("TIFF", "PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = encode(picture(50, 40), format)
        for end in (len(data) // 2, len(data) - 30):
            try:
                images.decode(data[:end], 10**6)
            except RowError as error:
                assert error.code in {"truncated_image", "corrupt_image"}
    assert capfd.readouterr() == ("", "")
