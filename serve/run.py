"""The server's process: an address is bound, models are found, and SIGTERM ends it once answers are given."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mlx_vlm_mini.checkpoints.cached import list_cached
from mlx_vlm_mini.checkpoints.hub import find_folder
from mlx_vlm_mini.checkpoints.load import load
from mlx_vlm_mini.decoder.rope import longest_context
from mlx_vlm_mini.errors import CheckpointError, VLMError
from mlx_vlm_mini.generation.engine import Engine
from mlx_vlm_mini.images.source import Access
from mlx_vlm_mini.layers.memory import device_memory

from .app import make_app
from .gate import is_this_machine, read_origin
from .limits import Limits
from .models import Load, Models
from .server import About, about, make_server

MODEL_SHARE = 0.75  # of the device's memory, for the weights of all models that are loaded


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        models: folders and names on the Hub.
        folders: each with models in its folders; those that cannot be served are left out.
        hub_cache: whether the models in the Hub's cache are served, too.
        host, port: where to listen; port 0 is any that is free.
        key: what each request must bring.
        batch_size: answers of a model that are given together.
        most_loaded: models that are loaded at a time.
        allow_urls: whether pictures may be addresses of the internet.
        origins: whose pages may ask, besides those of this machine.
        loading: options of `load`.
    """

    models: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    hub_cache: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    batch_size: int = 8
    most_loaded: int = 1
    allow_urls: bool = False
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    loading: dict[str, Any] = field(default_factory=dict)


def check(settings: Settings) -> Settings:
    """Settings that are safe.

    Raises:
        VLMError: they would serve other machines without a key, or make no sense.
    """
    if settings.key is not None and not settings.key.strip():
        raise VLMError("the key is empty: give one that nobody guesses, `openssl rand -hex 24` makes one")
    if settings.key is None and not is_this_machine(settings.host):
        raise VLMError(
            f"{settings.host} can be reached by other machines, and anybody there could ask: give a key with "
            "--api-key, or set MLX_VLM_MINI_API_KEY"
        )
    try:
        return replace(settings, origins=tuple(read_origin(origin) for origin in settings.origins))
    except ValueError as error:
        raise VLMError(str(error)) from None


def find_models(settings: Settings, say: Callable[[str], None]) -> tuple[dict[str, str], dict[str, About]]:
    """Names of models with where they lie, and what they are.

    Raises:
        CheckpointError: one of those that were named cannot be served, two have one name, or there are none.
    """
    sources: dict[str, str] = {}
    descriptions: dict[str, About] = {}
    for given in settings.models:
        folder = find_folder(given)
        name = given if not Path(given).exists() else Path(given).resolve().name
        if name in sources:
            raise CheckpointError(f"two models are called {name}: rename the folder of one")
        sources[name], descriptions[name] = given, about(str(folder))
    for name, source, folder in _others(settings):
        if name not in sources:
            try:
                descriptions[name] = about(str(folder))
                sources[name] = source
            except VLMError as error:
                say(f"{name} is not served: {error}")
    if not sources:
        raise CheckpointError("there is no model to serve: name one, or a folder that holds some")
    return sources, descriptions


def _others(settings: Settings) -> Iterator[tuple[str, str, Path]]:
    """Models that are not named themselves: names, what they are loaded by, and their folders."""
    for place in settings.folders:
        if not place.is_dir():
            raise CheckpointError(f"{place} is no folder with models")
        for file in sorted(place.glob("*/config.json")):
            yield file.parent.name, str(file.parent), file.parent
    if settings.hub_cache:
        for model in list_cached():
            yield model.name, model.name, model.folder


def loader(settings: Settings) -> Load:
    """What loads a model so that strangers may use it, and starts its engine."""

    def load_one(source: str) -> Engine:
        access = Access(urls=settings.allow_urls, pdfs=True)
        model, processor = load(source, access=access, **settings.loading)
        context = longest_context(model.config.decoder)
        return Engine(model, processor, batch_size=settings.batch_size, context=context)

    return load_one


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        VLMError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VLMError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None
    return listening


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM, which lets answers end, or Ctrl-C.

    Args:
        say: called with a line of what goes on: where it listens, requests.

    Raises:
        VLMError: it cannot begin.
        KeyboardInterrupt: after Ctrl-C.
    """
    settings = check(settings)
    with bind(settings.host, settings.port) as listening:
        sources, descriptions = find_models(settings, say)
        sizes = {name: described.bytes for name, described in descriptions.items()}
        memory = int(MODEL_SHARE * device_memory())
        models = Models(sources, loader(settings), most=settings.most_loaded, sizes=sizes, memory=memory)
        ended = asyncio.run(_serve(settings, models, descriptions, listening, say))
    if ended == signal.SIGINT:
        raise KeyboardInterrupt


async def _serve(
    settings: Settings,
    models: Models,
    descriptions: Mapping[str, About],
    listening: socket.socket,
    say: Callable[[str], None],
) -> int:
    first, limits = models.find(None), settings.limits
    say(f"loading {first.name}")
    server = make_server(models, descriptions, limits, at_once=settings.batch_size)
    try:
        await models.load(first)
        app = make_app(server, key=settings.key, origins=settings.origins, log=say)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what goes wrong is said by the gate
        running = _Running(configure(app, limits), say)
        listening.listen(2048)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(model.name for model in models)} at http://{shown}:{port}")
        await running.serve([listening])
        return running.signal
    finally:
        server.desk.close()
        await models.close()


def configure(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, ws="none", server_header=False,
        timeout_graceful_shutdown=int(limits.drain), timeout_keep_alive=30, limit_concurrency=limits.connections,
    )  # fmt: skip


class _Running(uvicorn.Server):
    """uvicorn's server, which SIGTERM and Ctrl-C end, a second one at once.

    Attributes:
        signal: the one that ended it.
    """

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self.signal = 0
        self.should_exit: bool = False
        self._say = say

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without what uvicorn's own does at the end: to raise the signal once more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with suppress(RuntimeError, ValueError, NotImplementedError):  # in another thread than the main one
                loop.add_signal_handler(number, self._end, number)
        yield

    def _end(self, number: int) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            self._say("ending: answers that are being given are waited for")
        self.signal, self.should_exit = self.signal or number, True
