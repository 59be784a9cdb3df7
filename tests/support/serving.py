"""A real server on loopback, in a thread: for tests of the server."""

import asyncio
import base64
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from mlx_vlm_mini.generation.engine import Engine
from mlx_vlm_mini.images.source import Access
from mlx_vlm_mini.serve.app import make_app
from mlx_vlm_mini.serve.limits import Limits
from mlx_vlm_mini.serve.models import Load, Models
from mlx_vlm_mini.serve.run import bind, configure
from mlx_vlm_mini.serve.server import Server, about, make_server


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: where it is asked.
        server: its models and counters.
        log: its lines.
        loop: its event loop.
    """

    url: str
    server: Server
    log: list[str]
    loop: asyncio.AbstractEventLoop

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **more)


@contextmanager
def served(
    sources: Mapping[str, str],
    load: Load,
    *,
    limits: Limits | None = None,
    most: int = 1,
    at_once: int = 4,
    **gate: Any,
) -> Iterator[Served]:
    """Serve models while the block runs; `gate`: of `make_app`."""
    log: list[str] = []
    ready = threading.Event()
    holder: list[Any] = []

    async def run() -> None:
        models = Models(sources, load, most=most)
        descriptions = {name: about(source) for name, source in sources.items()}
        server = make_server(models, descriptions, limits or Limits(), at_once=at_once)
        app = make_app(server, log=log.append, **gate)
        running, listening = uvicorn.Server(configure(app, server.limits)), bind("127.0.0.1", 0)
        holder.extend(
            [running, Served(f"http://127.0.0.1:{listening.getsockname()[1]}", server, log, asyncio.get_running_loop())]
        )
        ready.set()
        await running.serve([listening])
        server.desk.close()
        await models.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(30)
    try:
        yield holder[1]
    finally:
        holder[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def engine_of(
    model: Any, processor: Any, *, batch_size: int = 4, context: int | None = None, urls: bool = False
) -> Engine:
    """An engine as the server starts it."""
    processor.access = Access(urls=urls, pdfs=True)
    return Engine(model, processor, batch_size=batch_size, context=context)


def data_url(file: Path, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
