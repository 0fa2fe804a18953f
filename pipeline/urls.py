"""Fetches http(s) images within limits of size, time, redirects and addresses.

A row's URL is a stranger's: it may only lead to public addresses, judged after the name is
resolved and again at every redirect, and the connection goes to the very address that was judged.
Proxies of the environment are not used, since behind one no address can be judged.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipeline.errors import RowError

MAX_REDIRECTS = 5
MAX_TRIES = 3
PAUSE_SEC = 0.5  # before the second try, at most; doubled for the third
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})
_CHUNK = 1 << 16
_AGENT = "vlm-batch"

Resolve = Callable[[str, int], list[str]]


class _Transient(Exception):
    """Worth another try within the time limit."""


class Deadline:
    """The time that one image may take, all its tries and redirects together."""

    def __init__(self, timeout_sec: float) -> None:
        self.timeout_sec = timeout_sec
        self._end = time.monotonic() + timeout_sec

    def left(self) -> float:
        """Seconds left. Raises: RowError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.passed()
        return left

    def passed(self) -> RowError:
        return RowError("remote_timeout", f"The URL took more than {self.timeout_sec:g} seconds.")


class Client(NamedTuple):
    """How addresses are found and judged; tests put their own here."""

    resolve: Resolve
    is_allowed: Callable[[str], bool]


def fetch(url: str, timeout_sec: float, max_bytes: int, client: Client | None = None) -> bytes:
    """The body of the URL, at most `max_bytes`. Raises: RowError with a `remote_…` code."""
    client = client or Client(resolve, is_public)
    deadline = Deadline(timeout_sec)
    for attempt in range(MAX_TRIES):
        try:
            return _follow(url, deadline, max_bytes, client)
        except _Transient as error:
            if attempt == MAX_TRIES - 1:
                raise RowError("remote_failed", f"The URL cannot be read: {error}.") from None
            pause = PAUSE_SEC * 2**attempt * random.uniform(0.5, 1.0)
            if pause >= deadline.left():
                raise RowError("remote_failed", f"The URL cannot be read: {error}.") from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, whatever notation hides it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _embedded(ip)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address translates to: mapped, 6to4, Teredo or NAT64."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if ip in ipaddress.ip_network("64:ff9b::/96") or int(ip) >> 32 == 0:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _follow(url: str, deadline: Deadline, max_bytes: int, client: Client) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        connection = _connect(parts, deadline, client)
        watch = _cut_at(deadline, connection.sock)
        try:
            body, target = _request(connection, parts, deadline, max_bytes)
        except (TimeoutError, ssl.SSLWantReadError):
            raise deadline.passed() from None
        except (OSError, http.client.HTTPException) as error:
            deadline.left()
            raise _Transient(f"{type(error).__name__}: {error}") from None
        finally:
            watch.cancel()
            connection.close()
        if target is None:
            return body
        url = urljoin(url, target)
    raise RowError("remote_too_many_redirects")


def _cut_at(deadline: Deadline, link: socket.socket) -> threading.Timer:
    """Ends the connection at the deadline: a timeout alone starts anew with every byte."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(link, socket.SHUT_RDWR)  # of TLS too, without its farewell

    timer = threading.Timer(deadline.left(), cut)
    timer.daemon = True
    timer.start()
    return timer


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise RowError("remote_failed", f"The URL is malformed: {error}.") from None
    if parts.scheme not in ("http", "https"):
        message = f"The URL leads to a {parts.scheme or 'relative'} address."
        raise RowError("remote_forbidden", message)
    if not parts.hostname:
        raise RowError("remote_failed", "The URL names no host.")
    return parts


def _connect(parts: SplitResult, deadline: Deadline, client: Client) -> http.client.HTTPConnection:
    """A connection to an address that was judged. One bad address condemns the name."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = _resolve_in_time(host, port, deadline, client.resolve)
    if not all(client.is_allowed(address) for address in addresses):
        raise RowError("remote_forbidden")
    error: OSError | None = None
    for address in addresses:
        try:
            link = socket.create_connection((address, port), timeout=deadline.left())
            break
        except TimeoutError:
            raise deadline.passed() from None
        except OSError as raised:
            error = raised
    else:
        raise _Transient(f"no connection to {host}: {error}")
    connection = http.client.HTTPConnection(host, port)
    connection.sock = _encrypted(link, host, deadline) if parts.scheme == "https" else link
    return connection


def _encrypted(link: socket.socket, host: str, deadline: Deadline) -> socket.socket:
    try:
        return _tls().wrap_socket(link, server_hostname=host)
    except TimeoutError:
        link.close()
        raise deadline.passed() from None
    except ssl.SSLCertVerificationError as error:
        link.close()
        reason = error.verify_message
        raise RowError("remote_failed", f"The URL's certificate is invalid: {reason}.") from None
    except OSError as error:
        link.close()
        raise _Transient(f"no encrypted connection to {host}: {error}") from None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _resolve_in_time(host: str, port: int, deadline: Deadline, resolve: Resolve) -> list[str]:
    """The name's addresses; the system's resolver knows no timeout, so it runs in a thread."""
    found: list[str] = []
    errors: list[Exception] = []

    def look() -> None:
        try:
            found.extend(resolve(host, port))
        except (OSError, UnicodeError) as error:
            errors.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if thread.is_alive():
        raise deadline.passed()
    if errors and isinstance(errors[0], socket.gaierror) and errors[0].errno == socket.EAI_AGAIN:
        raise _Transient(f"the name {host} cannot be resolved now")
    if errors or not found:
        raise RowError("remote_failed", f"The URL's host {host!r} is unknown.")
    return found


def _request(
    connection: http.client.HTTPConnection, parts: SplitResult, deadline: Deadline, max_bytes: int
) -> tuple[bytes, str | None]:
    """(body, None), or (nothing, where the redirect leads)."""
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
    headers = {"User-Agent": _AGENT, "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
    connection.request("GET", path + query, headers=headers)
    with contextlib.closing(connection.getresponse()) as response:
        return _read(response, deadline, max_bytes)


def _read(
    response: http.client.HTTPResponse, deadline: Deadline, max_bytes: int
) -> tuple[bytes, str | None]:
    if response.status in _REDIRECTS and (target := response.getheader("Location")):
        return b"", target
    if response.status in _TRY_AGAIN:
        raise _Transient(f"the server answered {response.status}")
    if response.status != 200:
        message = f"The URL cannot be read: the server answered {response.status}."
        raise RowError("remote_failed", message)
    if response.getheader("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise RowError("remote_failed", "The server sent a compressed body, unasked.")
    return _body(response, deadline, max_bytes), None


def _body(response: http.client.HTTPResponse, deadline: Deadline, max_bytes: int) -> bytes:
    """The whole body; a server that drips is cut off at the deadline, a large body at the limit."""
    too_large = RowError("file_too_large", f"The URL's image has more than {max_bytes} bytes.")
    expected = response.length
    if expected is not None and expected > max_bytes:
        raise too_large
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise too_large
    deadline.left()  # a connection that was cut looks like the body's end
    if expected is not None and len(data) < expected:
        raise http.client.IncompleteRead(b"", expected - len(data))
    return bytes(data)
