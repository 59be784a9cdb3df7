"""The models that are served: loaded when they are asked for, unloaded when another needs their place."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_vlm_mini.errors import MemoryShortError, VLMError
from mlx_vlm_mini.generation.engine import Engine

from .refusals import Refusal, later, refuse

Made = TypeVar("Made")


class Load(Protocol):
    """Loads a model by the name or path that it was given by, and starts an engine on it."""

    def __call__(self, source: str, /) -> Engine: ...


@dataclass(eq=False)
class Model:
    """One that may be asked for.

    Attributes:
        name: what clients call it.
        source: where it lies: a folder, or its name on the Hub.
        created: seconds since 1970 at which it was first known here.
        engine: None where it is not loaded.
        users: requests that it is answering.
        used: `time.monotonic()` of its last use.
        load_s: seconds that loading took.
    """

    name: str
    source: str
    created: int = field(default_factory=lambda: int(time.time()))
    engine: Engine | None = None
    users: int = 0
    used: float = 0.0
    load_s: float = 0.0
    leaving: bool = False
    coming: "asyncio.Task[None] | None" = None


class Models:
    """Models by name; at most `most` are loaded at a time.

    A request for one that is not loaded waits until those before it that need another are answered. Requests for a
    model that is to make room wait until it comes back, so that none waits without an end.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Load,
        *,
        most: int = 1,
        sizes: Mapping[str, int] | None = None,
        memory: int | None = None,
    ) -> None:
        """
        Args:
            sources: names, each with a folder or a name on the Hub.
            most: models that are loaded at a time.
            sizes: bytes of their files.
            memory: bytes of those that are loaded at a time; one alone may have more.
        """
        self._sizes, self._memory = sizes or {}, memory
        self._known = {name: Model(name, source) for name, source in sources.items()}
        self._load, self._most = load, most
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mlx-vlm-mini-loading")

    def __iter__(self) -> Iterator[Model]:
        return iter(self._known.values())

    def find(self, name: str | None) -> Model:
        """A model by what a client calls it; the first where it names none.

        Raises:
            Refusal: there is none of that name.
        """
        if name is None:
            return next(iter(self))
        found = self._known.get(name) or self._known.get(name.removesuffix(":latest"))
        if found is None:
            names = ", ".join(self._known)
            raise Refusal(404, f"the model {name[:200]} is not served here: choose {names}", "model", "model_not_found")
        return found

    @asynccontextmanager
    async def use(self, model: Model) -> AsyncIterator[Engine]:
        """A model's engine, loaded until the block ends.

        Raises:
            Refusal: it cannot be loaded.
        """
        while model.leaving:
            await self._changed.wait()
        model.users += 1
        try:
            if model.engine is None:
                if model.coming is None:
                    model.coming = asyncio.create_task(self._bring(model))
                    model.coming.add_done_callback(_note)
                await asyncio.shield(model.coming)
            assert model.engine is not None
            yield model.engine
        finally:
            model.users -= 1
            model.used = time.monotonic()
            self._notify()

    async def load(self, model: Model) -> None:
        """Load a model before it is asked for.

        Raises:
            Refusal: it cannot be loaded.
        """
        async with self.use(model):
            pass

    async def unload(self, model: Model) -> None:
        """Give up a model's memory once its requests are answered."""
        async with self._turn:
            await self._give_up(model)

    async def close(self) -> None:
        """Unload all; what is being answered gets an error."""
        for model in self:
            await self._end(model)
        self._worker.shutdown()

    async def _bring(self, model: Model) -> None:
        """Load a model, after others have made room."""
        try:
            async with self._turn:
                begin = time.monotonic()
                while model.engine is None:
                    while (loaded := self._loaded()) and not self._has_room(model, loaded):
                        await self._give_up(loaded[0])
                    try:
                        model.engine = await self._work(lambda: self._load(model.source))
                    except MemoryShortError:
                        if not loaded:
                            raise
                        await self._give_up(loaded[0])
                model.load_s = time.monotonic() - begin
        except MemoryError:
            raise later(f"there is not enough memory to load {model.name}", 30, 503) from None
        except MemoryShortError as error:
            raise later(f"{model.name} cannot be loaded: {error}", 30, 503) from None
        except VLMError as error:
            found = refuse(error)
            raise Refusal(
                500, f"{model.name} cannot be loaded: {found.message}", "model", headers=found.headers
            ) from None
        finally:
            model.coming = None

    def _loaded(self) -> list[Model]:
        """Models that are loaded, the one used longest ago first."""
        return sorted((model for model in self if model.engine is not None), key=lambda model: model.used)

    def _has_room(self, model: Model, loaded: list[Model]) -> bool:
        """Whether a model may be loaded beside others."""
        taken = sum(self._sizes.get(each.name, 0) for each in (model, *loaded))
        return len(loaded) < self._most and (self._memory is None or taken <= self._memory)

    async def _give_up(self, model: Model) -> None:
        model.leaving = True
        try:
            while model.users:
                await self._changed.wait()
            await self._end(model)
        finally:
            model.leaving = False
            self._notify()

    async def _end(self, model: Model) -> None:
        if model.engine is not None:
            engines, model.engine = [model.engine], None
            await self._work(lambda: _close(engines))

    async def _work(self, do: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._worker, do)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _note(task: "asyncio.Task[None]") -> None:
    """Take note of an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def _close(engines: list[Engine]) -> None:
    """End the one engine and give back its model's memory, which no other name may hold."""
    engines.pop().close()
    gc.collect()
    mx.clear_cache()
