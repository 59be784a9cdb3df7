"""A request's body -> a JSON object, within limits."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from .limits import Limits
from .refusals import Refusal, later

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_AT_ONCE = 2**20  # bytes that the event loop parses without a thread


class Gone(Exception):
    """The client has closed the connection: nobody reads an answer."""


class Bodies:
    """Reads bodies.

    Attributes:
        held: bytes of all that are held now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """A request's JSON object; its bytes count as held until the block ends.

        Raises:
            Refusal: the body is too large, comes too slowly, or is no JSON object.
            Gone: the client left.
        """
        size = 0

        def hold(more: int) -> None:
            nonlocal size
            if size + more > self._limits.body:
                raise Refusal(
                    413, f"the body is larger than {self._limits.body >> 20} MiB: send fewer or smaller images"
                )
            if self.held + more > self._limits.bodies:
                raise later("other requests' bodies fill the memory that is set aside for them: try again", 2, 503)
            size += more
            self.held += more

        try:
            length = request.headers.get("content-length", "")
            if length.isdecimal() and int(length) > self._limits.body:
                hold(int(length))  # refused before it is read
            data = bytearray()
            async for part in _parts(request.receive, self._limits.silence):
                hold(len(part))
                data += part
            found = await parse(bytes(data), self._limits.depth)
            data.clear()
            yield found
        finally:
            self.held -= size


async def _parts(receive: Receive, silence: float) -> AsyncIterator[bytes]:
    while True:
        try:
            message = await asyncio.wait_for(receive(), silence)
        except TimeoutError:
            raise Refusal(408, f"the body did not come: no byte in {silence:g} s") from None
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def parse(data: bytes, depth: int) -> dict[str, Any]:
    """A JSON object of a body.

    Raises:
        Refusal: it is none, or nested deeper than `depth`.
    """
    if len(data) <= _AT_ONCE:
        return _parse(data, depth)
    return await asyncio.to_thread(_parse, data, depth)


def _parse(data: bytes, depth: int) -> dict[str, Any]:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        found = json.loads(data.decode("utf-8-sig"), parse_constant=constant)
    except RecursionError:
        raise _too_deep(depth) from None
    except ValueError as error:  # also of UTF-8, and of numbers with thousands of digits
        reason = str(error) if not isinstance(error, UnicodeDecodeError) else "it is not UTF-8"
        raise Refusal(400, f"the body is no JSON: {reason}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body must be a JSON object")
    if _SURROGATE.search(data) and not _can_be_written(found):
        raise Refusal(400, "the body has half of a surrogate pair, which is no character: leave it out")
    level: list[Any] = [found]
    for _ in range(depth):
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return found
    raise _too_deep(depth)


def _can_be_written(content: dict[str, Any]) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _too_deep(depth: int) -> Refusal:
    return Refusal(400, f"the body has more than {depth} lists and objects inside one another")
