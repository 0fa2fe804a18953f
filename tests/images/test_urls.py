"""Remote images: every limit, against a loopback server that breaks each of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from pipeline import urls
from pipeline.errors import RowError
from tests.helpers.web import PICTURE, Web, serve_web

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serve_web() as web:
        yield web


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSE_SEC", 0.01)


def fetch(web: Web, path: str, timeout_sec: float = 10.0, host: str = "good.test") -> bytes:
    return urls.fetch(web.url(path, host), timeout_sec, LIMIT, web.client())


@pytest.mark.parametrize("path", ["/picture", "/hop", "/open-end", "/flaky", "/picture?a=b c&d=é"])
def test_what_can_be_fetched(web: Web, path: str) -> None:
    assert fetch(web, path) == PICTURE


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/missing", "remote_failed"),
        ("/busy", "remote_failed"),
        ("/short", "remote_failed"),
        ("/packed", "remote_failed"),
        ("/endless-header", "remote_failed"),
        ("/huge", "file_too_large"),
        ("/huge-unannounced", "file_too_large"),
        ("/loop", "remote_too_many_redirects"),
        ("/to-private", "remote_forbidden"),
        ("/to-private-name", "remote_forbidden"),
        ("/to-file", "remote_forbidden"),
    ],
)
def test_what_cannot(web: Web, path: str, code: str) -> None:
    with pytest.raises(RowError) as raised:
        fetch(web, path)
    assert raised.value.code == code


@pytest.mark.parametrize("path", ["/silent", "/drip", "/drip-header"])
def test_slow_servers_are_cut_off(web: Web, path: str) -> None:
    began = time.monotonic()
    with pytest.raises(RowError) as raised:
        fetch(web, path, timeout_sec=0.5)
    assert raised.value.code == "remote_timeout"
    assert time.monotonic() - began < 2.0


def test_a_resolver_that_hangs_is_not_waited_for(web: Web) -> None:
    began = time.monotonic()
    with pytest.raises(RowError) as raised:
        fetch(web, "/picture", timeout_sec=0.3, host="hang.test")
    assert raised.value.code == "remote_timeout"
    assert time.monotonic() - began < 2.0


def test_one_private_address_condemns_a_name(web: Web) -> None:
    for host in ("two.test", "private.test", "10.1.2.3"):
        with pytest.raises(RowError) as raised:
            fetch(web, "/picture", host=host)
        assert raised.value.code == "remote_forbidden"


def test_unknown_hosts_and_odd_urls(web: Web) -> None:
    client = web.client()
    for url, code in {
        "http://nowhere.test/x.jpg": "remote_failed",
        "http:///x.jpg": "remote_failed",
        "http://good.test:99999/x": "remote_failed",
        "http://[::1/x": "remote_failed",
        "ftp://good.test/x.jpg": "remote_forbidden",
        "gopher://good.test": "remote_forbidden",
        "http://" + "a" * 300 + ".test/": "remote_failed",
        "http://good.test:1/closed": "remote_failed",
    }.items():
        with pytest.raises(RowError) as raised:
            urls.fetch(url, 5.0, LIMIT, client)
        assert raised.value.code == code, url


def test_transient_answers_are_tried_three_times(web: Web) -> None:
    before = web.asked["/busy"]
    with pytest.raises(RowError):
        fetch(web, "/busy")
    assert web.asked["/busy"] - before == urls.MAX_TRIES


def test_a_line_break_in_the_url_makes_no_header(web: Web) -> None:
    url = web.url("/picture?a") + "\r\nX-Evil: 1"
    assert urls.fetch(url, 5.0, LIMIT, web.client()) == PICTURE
    assert web.asked["/picture?aX-Evil:%201"] == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1", "240.0.0.1", "::1", "::",
        "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not urls.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert urls.is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "[::1]"])
def test_the_real_client_refuses_this_machine(web: Web, host: str) -> None:
    with pytest.raises(RowError) as raised:
        urls.fetch(web.url("/picture", host), 5.0, LIMIT)
    assert raised.value.code == "remote_forbidden"


def test_resolve_lists_addresses() -> None:
    assert "127.0.0.1" in urls.resolve("127.0.0.1", 80)
    with pytest.raises(OSError, match="."):
        urls.resolve("no.such.host.invalid", 80)
    assert socket.gaierror
