"""Videos by path and URL: the rules of images, with limits of their own, loaded ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import urls
from pipeline.errors import RowError
from pipeline.media import load
from pipeline.prefetch import ImageLoader
from pipeline.rows import ImageRef, Row
from pipeline.settings import InputSettings
from tests.helpers.web import PICTURE, Web, serve_web


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that counts as a public one."""
    with serve_web() as web:
        client = web.client()
        monkeypatch.setattr(urls, "resolve", client.resolve)
        monkeypatch.setattr(urls, "is_public", client.is_allowed)
        monkeypatch.setattr(urls, "PAUSE_SEC", 0.01)
        yield web


def _ref(path: str) -> ImageRef:
    return ImageRef(path=path, kind="video")


def _settings(**more: object) -> InputSettings:
    return InputSettings(path="x", remote=True, remote_timeout_sec=5.0, **more)  # type: ignore[arg-type]


def test_a_url(web: Web) -> None:
    assert load(_ref(web.url("/picture")), _settings()) == PICTURE


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/missing", "remote_failed"),
        ("/to-private", "remote_forbidden"),
        ("/loop", "remote_too_many_redirects"),
        ("/huge", "file_too_large"),
        ("/huge-unannounced", "file_too_large"),
    ],
)
def test_the_rules_of_images_hold(web: Web, path: str, code: str) -> None:
    with pytest.raises(RowError) as caught:
        load(_ref(web.url(path)), _settings(max_video_bytes=1 << 20))
    assert caught.value.code == code


def test_the_limit_is_the_videos_own(web: Web) -> None:
    settings = _settings(max_bytes=10)
    assert load(_ref(web.url("/picture")), settings) == PICTURE
    with pytest.raises(RowError) as caught:
        load(_ref(web.url("/picture")), _settings(max_video_bytes=10))
    assert "The video has more than 10 bytes" in str(caught.value)


def test_videos_are_loaded_ahead_beside_images(web: Web, tmp_path: Path) -> None:
    """The same address as an image and as a video is two loads: their limits differ."""
    url = web.url("/picture")
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a video")
    loader = ImageLoader(_settings(max_bytes=10))
    rows = [
        Row(f"r{n}", n, {}, (ImageRef(path=url),), videos=(_ref(url), _ref(str(path))))
        for n in range(5)
    ]
    try:
        for row in loader.ahead(rows, lambda row: True):
            with pytest.raises(RowError):
                loader.load(row.images[0])
            assert [loader.load(ref) for ref in row.videos] == [PICTURE, b"a video"]
    finally:
        loader.close()
