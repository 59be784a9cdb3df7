"""Responses that come piece by piece, and end the work behind them however they end."""

from collections.abc import AsyncIterator

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answers import Answers


class Stream(Response):
    """Sends pieces of a body as they are made."""

    def __init__(self, answers: Answers, pieces: AsyncIterator[bytes], media_type: str, scope: Scope) -> None:
        """
        Args:
            answers: closed at the end.
            scope: gets a note for the log.
        """
        self.status_code, self.media_type = 200, media_type
        self.background: BackgroundTask | None = None
        self._answers, self._pieces, self._scope = answers, pieces, scope
        self.init_headers({"x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._scope["note"] = self._answers.note
            await self._answers.close()
