"""The one gate before every route: host, origin, key; and what every response carries.

A page of another site cannot use the server through its visitor's browser: a name that leads here without being one of
this machine's is refused (DNS rebinding), and so is what another origin asks for.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from traceback import extract_tb
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_vlm_mini.errors import VLMError

from .bodies import Gone
from .limits import Limits
from .refusals import Refusal, refuse

OBSIDIAN = "app://obsidian.md"
METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_ALWAYS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


def host_of(text: str) -> str:
    """The name or number in `host`, `host:port` or `[::1]:port`, in lower case; the empty text where there is none."""
    with suppress(ValueError):
        return (urlsplit(f"//{text}").hostname or "").rstrip(".")
    return ""


def is_this_machine(host: str) -> bool:
    """Whether a name can lead to this machine alone, whoever answers for names."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def is_number(host: str) -> bool:
    """Whether it is an IP address, which nobody can make lead elsewhere."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


def read_origin(text: str) -> str:
    """An origin as browsers write it: `scheme://host[:port]`.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(text.strip().lower())
    if not parts.scheme or not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment or "@" in text:
        raise ValueError(f"{text} is no origin: write scheme://host or scheme://host:port")
    return f"{parts.scheme}://{parts.netloc}"


class Gate:
    """An ASGI application before another, which nothing reaches that is not let through."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        key: str | None = None,
        origins: Collection[str] = (),
        log: Callable[[str], None] = lambda line: None,
        count: Callable[[str, int], None] = lambda route, status: None,
    ) -> None:
        """
        Args:
            key: what every request must bring, as a Bearer token or the password of Basic authentication.
            origins: those that may ask besides this machine's own, as `read_origin` gives them; their hosts are names
                of this server, too.
            log: called with a line for each request; it holds nothing of what was said or shown.
            count: called with each request's route and status; 499 where the client left.
        """
        self._app, self._limits, self._log, self._count = app, limits, log, count
        self._key = None if key is None else _digest(key)
        self._origins = {OBSIDIAN, *origins}
        self._hosts = {host_of(origin.partition("://")[2]) for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers, begin, sent = Headers(scope=scope), time.monotonic(), _Sent()
        origin = headers.get("origin")

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.status = message["status"]
                found = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    found.setdefault(name, value)
                found.add_vary_header("origin")
                if origin is not None and self._may_ask(origin, headers):
                    found["access-control-allow-origin"] = origin
            try:
                async with asyncio.timeout(self._limits.silence):
                    await send(message)
            except TimeoutError:  # it does not read
                raise Gone from None

        try:
            response = self._check(scope, headers, origin)
            if response is not None:
                await response(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        except Gone:
            sent.note = "the client left"
        except Refusal as refusal:
            await self._refuse(refusal, scope, receive, sending, sent)
        except VLMError as error:
            await self._refuse(refuse(error), scope, receive, sending, sent)
        except Exception as error:  # a fault of ours: its place is told, not what it was about
            last = extract_tb(error.__traceback__)[-1]
            self._log(f"fault: {type(error).__name__} at {last.filename}:{last.lineno} in {last.name}")
            await self._refuse(Refusal(500, "the server failed; its log says where"), scope, receive, sending, sent)
        finally:
            path = ascii(scope["path"][:100])[1:-1]
            note = sent.note or scope.get("note")
            self._count(scope.get("route_path", "none"), sent.status or 499)
            self._log(
                f"{scope['method'][:10]} {path} {sent.status or '-'} {time.monotonic() - begin:.2f} s"
                + (f", {note}" if note else "")
            )

    def _check(self, scope: Scope, headers: Headers, origin: str | None) -> Response | None:
        """A response that ends the matter; None lets the request through.

        Raises:
            Refusal: host, origin or key are not such as may ask.
        """
        host = host_of(headers.get("host", ""))
        if len(headers.getlist("host")) != 1 or not (is_number(host) or is_this_machine(host) or host in self._hosts):
            raise Refusal(
                403, f"this server is not called {host[:100] or 'nothing'}: use its number, or start it with --origin"
            )
        if origin is not None and not self._may_ask(origin, headers):
            raise Refusal(
                403, f"pages of {origin[:100]} may not ask here: start the server with --origin {origin[:100]}"
            )
        if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return _preflight(headers)
        if self._key is not None and not self._has_key(headers):
            raise Refusal(
                401,
                "a key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers=(("www-authenticate", 'Basic realm="mlx-vlm-mini: any name, the key as password"'),),
            )
        return None

    def _may_ask(self, origin: str, headers: Headers) -> bool:
        """Whether a page of an origin may ask: of this machine, of this server itself, or one that was named."""
        origin = origin.lower()
        if origin in self._origins:
            return True
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https"):
            return False
        return is_this_machine(host_of(place)) or place == headers.get("host", "").lower()

    def _has_key(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":  # a browser's own question
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        elif kind.lower() != "bearer":
            given = ""
        return self._key is not None and hmac.compare_digest(_digest(given.strip()), self._key)

    async def _refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send, sent: "_Sent") -> None:
        if sent.status is not None:  # it has begun, and stays without its last chunk: nobody takes it for whole
            sent.note = "ended by an error"
            return
        headers = dict(refusal.headers)
        if refusal.status in (408, 413):
            await self._refuse_unread(refusal, scope, receive, send, headers)
            return
        with suppress(Gone):
            await JSONResponse(refusal.body(scope["path"]), refusal.status, headers)(scope, receive, send)

    async def _refuse_unread(
        self, refusal: Refusal, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]
    ) -> None:
        """Answer before the body was read, and read on for a while: a client that writes sees no answer."""
        body = json.dumps(refusal.body(scope["path"])).encode()
        headers |= {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        start = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        with suppress(Gone, TimeoutError):
            await send({"type": "http.response.start", "status": refusal.status, "headers": start})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            async with asyncio.timeout(self._limits.linger):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        with suppress(Gone):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Sent:
    """What was sent of a response: its status, and a note for the log."""

    status: int | None = None
    note: str = ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _preflight(headers: Headers) -> Response:
    """What a browser asks before a page's request: which methods and headers are allowed."""
    asked = headers.get("access-control-request-headers", "").lower().split(",")
    names = [name for name in (each.strip() for each in asked[:64]) if _NAME.fullmatch(name)]
    allowed = {
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": ", ".join(names) or "content-type",
        "access-control-max-age": "600",
        "vary": "origin, access-control-request-headers",
    }
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)
