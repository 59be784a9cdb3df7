"""An http(s) address -> its bytes: within limits, and never from a private network unless that is allowed.

The name is resolved once, every address that it has is checked, and the connection goes to a checked one, so that a
second answer of the name server cannot lead elsewhere. Each redirect begins anew. Proxies are not used: they would
resolve the name themselves.
"""

import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mlx_vlm_mini.errors import ImageError

MOST_BYTES = 64 * 2**20
MOST_SECONDS = 30.0  # from the first request to the last byte, redirects included
MOST_REDIRECTS = 5
PRIVATE = "MLX_VLM_MINI_PRIVATE_URLS"
_HAND_OVER = 5.0  # seconds after which the next of a name's addresses is tried
_EMBEDDING = [ipaddress.ip_network(name) for name in ("64:ff9b::/96", "::/96")]  # IPv4 in the last 32 bits
_CLOUD = [ipaddress.ip_network(name) for name in ("192.0.0.0/24", "168.63.129.16/32")]  # services that look public
_UNQUOTED = "/%:@!$&'()*+,;=~?[]"


def private_allowed() -> bool:
    """Whether the environment allows addresses of this machine and its networks."""
    return os.environ.get(PRIVATE) == "1"


def download(url: str, *, private: bool) -> bytes:
    """What an address gives.

    Args:
        private: whether this machine and its networks may be asked, too.

    Raises:
        ImageError: it is not http(s), or not public, or gives nothing, too much, or too slowly.
    """
    until, where = time.monotonic() + MOST_SECONDS, url
    for _ in range(1 + MOST_REDIRECTS):
        try:
            found = _ask(where, until, private)
        except ImageError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            if time.monotonic() < until:
                reason = getattr(error, "strerror", None) or error or type(error).__name__
                raise ImageError(f"cannot download {where}: {reason}") from None
            found = None
        if found is None or time.monotonic() >= until:
            raise ImageError(f"{url} takes longer than {MOST_SECONDS:g} s: download it and give its path")
        if isinstance(found, bytes):
            return found
        where = found
    raise ImageError(f"{url} redirects more than {MOST_REDIRECTS} times: give the address where it ends")


def is_public(address: str) -> bool:
    """Whether an IP address lies in the internet: not in this machine, its networks, or a cloud's inner services.

    Addresses of IPv6 that carry one of IPv4 are as public as that is.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is None and any(found in network for network in _EMBEDDING):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not any(found in network for network in _CLOUD)


def _ask(url: str, until: float, private: bool) -> bytes | str:
    """One request: the bytes, or the address that it redirects to."""
    parts = _split(url)
    host, secure = str(parts.hostname), parts.scheme == "https"
    sock = _connect(_resolve(host, parts.port or (443 if secure else 80), url, private), until)
    held = [sock]
    clock = threading.Timer(max(until - time.monotonic(), 0), _cut, [held])
    clock.daemon = True
    clock.start()
    try:
        if secure:
            wrapped = ssl.create_default_context().wrap_socket(
                sock, server_hostname=host, do_handshake_on_connect=False
            )
            held[0] = wrapped  # before it shakes hands, which may take for ever
            wrapped.do_handshake()
        connection = http.client.HTTPConnection(host)
        connection.sock = held[0]
        target = quote(parts.path or "/", safe=_UNQUOTED) + (
            f"?{quote(parts.query, safe=_UNQUOTED)}" if parts.query else ""
        )
        headers = {"Host": parts.netloc.encode("idna").decode(), "User-Agent": "mlx-vlm-mini", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        return _read(connection.getresponse(), url)
    finally:
        clock.cancel()
        held[0].close()


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{url} is not http(s), and nothing else is allowed: give a path or an http(s) address")
    if "@" in parts.netloc:
        raise ImageError(
            f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]} holds a name or a password: leave it out"
        )
    if not parts.hostname:
        raise ImageError(f"{url} names no host")
    return parts


def _resolve(host: str, port: int, url: str, private: bool) -> list[tuple[str, int]]:
    """All addresses of a host, in whatever form it is written: names, and numbers with octal, or few parts."""
    found = [(str(entry[4][0]), port) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not private and not all(is_public(address) for address, _ in found):
        raise ImageError(
            f"{url} leads to this machine or a private network, and only public addresses are opened: give the file, "
            f"or set {PRIVATE}=1"
        )
    return found


def _connect(addresses: list[tuple[str, int]], until: float) -> socket.socket:
    """A connection to the first address that takes one."""
    for number, address in enumerate(addresses, 1):
        left = max(until - time.monotonic(), 0.001)
        try:
            sock = socket.create_connection(address, left if number == len(addresses) else min(left, _HAND_OVER))
        except OSError:
            if number == len(addresses):
                raise
        else:
            sock.settimeout(left)
            return sock
    raise OSError("the host has no address")


def _cut(held: list[socket.socket]) -> None:
    """End a connection on whose other side somebody takes his time."""
    with suppress(OSError):
        socket.socket.shutdown(held[0], socket.SHUT_RDWR)  # of an encrypted one, too, which stays what it is


def _read(answer: http.client.HTTPResponse, url: str) -> bytes | str:
    if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
        return urljoin(url, answer.headers["Location"])
    if answer.status != 200:
        raise ImageError(f"cannot download {url}: HTTP {answer.status} {answer.reason}")
    too_large = (answer.length or 0) > MOST_BYTES
    data = b"" if too_large else answer.read(MOST_BYTES + 1)
    if too_large or len(data) > MOST_BYTES:
        raise ImageError(f"{url} is larger than {MOST_BYTES // 2**20} MiB: download it and give its path")
    if answer.length:
        raise OSError(f"it ended {answer.length} bytes too early; try again")
    return data
