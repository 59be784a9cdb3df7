"""The application: which path and method is answered by what, behind the gate."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from . import attention, browser, ollama, openai
from .gate import Gate
from .refusals import Refusal
from .server import Server

Answer = Callable[[Server, Request], Awaitable[Response]]


async def health(server: Server, request: Request) -> Response:
    """`GET /health`: which models are loaded, and how many requests there are."""
    loaded = [model.name for model in server.models if model.engine is not None]
    return JSONResponse({"status": "ok", "loaded": loaded, "busy": server.desk.busy})


async def metrics(server: Server, request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    for model in server.models:
        server.metrics.loaded.labels(model.name).set(model.engine is not None)
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES: dict[str, dict[str, Answer]] = {
    "/": {"GET": browser.root},
    "/page/{name:path}": {"GET": browser.file},
    "/health": {"GET": health},
    "/metrics": {"GET": metrics},
    "/v1/models": {"GET": openai.models},
    "/v1/models/{name:path}": {"GET": openai.model},
    "/v1/chat/completions": {"POST": openai.chat},
    "/v1/attention": {"POST": attention.attention},
    "/api/version": {"GET": ollama.version},
    "/api/tags": {"GET": ollama.tags},
    "/api/ps": {"GET": ollama.running_models},
    "/api/show": {"POST": ollama.show},
    "/api/chat": {"POST": ollama.chat},
    "/api/generate": {"POST": ollama.generate},
}
"""Paths, and what answers each method."""


class _Endpoint:
    """An ASGI application for one path."""

    def __init__(self, server: Server, path: str, answers: dict[str, Answer]) -> None:
        self._server, self._path, self._answers = server, path, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route_path"] = self._path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        answer = self._answers.get(method)
        if answer is None:
            allowed = ", ".join(self._answers)
            message = f"{self._path} takes {allowed}, not {scope['method'][:10]}"
            raise Refusal(405, message, headers=(("allow", allowed),))
        response = await answer(self._server, Request(scope, receive, send))
        await response(scope, receive, send)


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise Refusal(404, f"there is nothing at {scope['path'][:100]}: the interface is below /v1 and /api")


def make_app(
    server: Server,
    *,
    key: str | None = None,
    origins: Collection[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> ASGIApp:
    """The whole application; arguments as of `Gate`."""
    routes: Any = [Route(path, _Endpoint(server, path, answers)) for path, answers in ROUTES.items()]
    router = Router(routes, redirect_slashes=False, default=_nowhere)
    requests = server.metrics.requests

    def count(route: str, status: int) -> None:
        requests.labels(route, status).inc()

    return Gate(router, limits=server.limits, key=key, origins=origins, log=log, count=count)
