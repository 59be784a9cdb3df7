"""Models by name: loaded when asked for, unloaded for another, and failures that stay theirs."""

import asyncio
import threading
from typing import Any

import pytest
from checkpoints import PLAIN

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from serving import served

from mlx_vlm_mini.errors import CheckpointError, MemoryShortError
from mlx_vlm_mini.serve.models import Models
from mlx_vlm_mini.serve.refusals import Refusal
from mlx_vlm_mini.serve.run import Settings, find_models, loader

NAMES = {"a": "A", "b": "B", "c": "C"}


class Fake:
    """In place of an engine."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self._events = name, events
        events.append(f"load {name}")

    def close(self) -> None:
        self._events.append(f"close {self.name}")


def make(events: list[str], *, most: int = 1, broken: str = "") -> Models:
    def load(source: str) -> Any:
        if source == broken:
            raise CheckpointError("no weights")
        return Fake(source, events)

    return Models(NAMES, load, most=most)


def test_one_at_a_time_in_the_order_of_the_requests():
    events: list[str] = []

    async def use(models: Models, name: str, go: asyncio.Event | None = None) -> None:
        async with models.use(models.find(name)):
            events.append(f"use {name}")
            if go is not None:
                await go.wait()

    async def run() -> None:
        models, go = make(events), asyncio.Event()
        first = asyncio.create_task(use(models, "a", go))
        await asyncio.sleep(0.01)
        together = asyncio.create_task(use(models, "a"))
        await together  # a model that is loaded takes more requests
        others = []
        for name in ("b", "a", "c"):
            others.append(asyncio.create_task(use(models, name)))
            await asyncio.sleep(0.02)
        assert events == ["load A", "use a", "use a"]  # b waits for the first; a waits for b
        go.set()
        await asyncio.gather(first, *others)
        await models.close()

    asyncio.run(run())
    assert events[3:6] == ["close A", "load B", "use b"]
    assert sorted(events[6:]) == sorted(["close B", "load A", "use a", "close A", "load C", "use c", "close C"])


def test_the_one_used_longest_ago_makes_room():
    events: list[str] = []

    async def run() -> None:
        models = make(events, most=2)
        for name in ("a", "b", "a", "c"):
            await models.load(models.find(name))
        assert [model.name for model in models if model.engine is not None] == ["a", "c"]
        await models.unload(models.find("a"))
        await models.close()

    asyncio.run(run())
    assert events == ["load A", "load B", "close B", "load C", "close A", "close C"]


def test_memory_makes_room():
    """By what the files take, and where loading finds too little."""
    events: list[str] = []

    async def run() -> None:
        models = Models(NAMES, lambda source: Fake(source, events), most=3, sizes={"a": 5, "b": 4, "c": 3}, memory=8)  # type: ignore[arg-type,return-value]
        for name in ("a", "b", "c"):
            await models.load(models.find(name))
        assert events == ["load A", "close A", "load B", "load C"]
        await models.close()

        def short(source: str) -> Any:
            if source == "B" and "close A" not in events:
                raise MemoryShortError("too little")
            return Fake(source, events)

        events.clear()
        models = Models(NAMES, short, most=3)
        for name in ("a", "b"):
            await models.load(models.find(name))
        assert events == ["load A", "close A", "load B"]
        await models.close()
        events.clear()
        models = Models(NAMES, short)
        with pytest.raises(Refusal) as found:
            await models.load(models.find("b"))
        assert found.value.status == 503 and ("retry-after", "30") in found.value.headers
        await models.close()

    asyncio.run(run())
    assert events == []


def test_a_model_that_does_not_load_fails_alone():
    events: list[str] = []

    async def run() -> None:
        models = make(events, broken="B")
        for _ in range(2):
            with pytest.raises(Refusal) as found:
                await models.load(models.find("b"))
            assert found.value.message == "b cannot be loaded: no weights" and found.value.status == 500
        await models.load(models.find("a"))
        await models.close()

    asyncio.run(run())
    assert events == ["load A", "close A"]


def test_a_client_that_leaves_while_a_model_loads_leaves_it_loaded():
    go = threading.Event()

    async def run() -> None:
        models = Models(NAMES, lambda source: (go.wait(5), Fake(source, []))[1])  # type: ignore[return-value,arg-type]
        task = asyncio.create_task(models.load(models.find("a")))
        await asyncio.sleep(0.01)
        task.cancel()
        go.set()
        await models.load(models.find("a"))
        (a, _, _) = models
        assert a.users == 0 and a.engine is not None
        await models.close()

    asyncio.run(run())


def test_names_and_folders(copy_of, tmp_path):
    said: list[str] = []
    (tmp_path / "all").mkdir()
    copy_of().rename(tmp_path / "all" / "one")
    (tmp_path / "all" / "broken").mkdir()
    (tmp_path / "all" / "broken" / "config.json").write_text("{}")
    (tmp_path / "all" / "empty").mkdir()
    sources, about = find_models(Settings(models=(str(PLAIN), "demo"), folders=(tmp_path / "all",)), said.append)
    assert list(sources) == list(about) == [PLAIN.name, "demo", "one"]
    assert about["demo"].size == "3.74M" and about["demo"].vision and about["demo"].quantization == "F16"
    assert len(said) == 1 and said[0].startswith("broken is not served: ")
    for bad, message in (
        (
            Settings(models=(str(PLAIN), f"{PLAIN}/")),
            "two models are called",
        ),
        (Settings(models=(str(tmp_path / "none"),)), "none"),
        (Settings(models=(), folders=(tmp_path / "none",)), "is no folder with models"),
        (Settings(models=(), folders=(tmp_path / "all" / "empty",)), "there is no model to serve"),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_models(bad, said.append)


def test_two_models_over_http(copy_of, tmp_path):
    broken = copy_of()
    settings = Settings(models=(), batch_size=2)
    sources = {"demo": "demo", "tiny": str(PLAIN), "broken": str(broken)}
    with served(sources, loader(settings)) as server, server.client() as client:
        (broken / "model.safetensors").write_bytes(b"x" * 100)
        for name in ("demo", "tiny", "tiny", "broken", "demo"):
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            response = client.post("/v1/chat/completions", json=body)
            loaded = client.get("/health").json()["loaded"]
            if name == "broken":
                assert response.status_code == 500 and "broken cannot be loaded" in response.json()["error"]["message"]
                assert response.headers["x-should-retry"] == "false" and loaded == []
            else:
                assert response.status_code == 200 and loaded == [name]
