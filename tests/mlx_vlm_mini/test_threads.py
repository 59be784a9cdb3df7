"""Several threads and one model: answers take turns, each is what it would be alone, and a conversation is one thread's."""

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from reference import GOLDEN

from mlx_vlm_mini import Chat, Engine, batch_generate, generate, load, stream_generate
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.decode import wired_memory
from mlx_vlm_mini.generation.step import COMPILE

QUESTIONS: list[tuple[str, list[Path]]] = [
    ("What is it?", [PHOTO]), ("Hello there", []), ("Which colour?", [SHAPES]), ("Two?", [PHOTO, SHAPES]),
]  # fmt: skip


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return, each in a thread of its own, all at once; an error is returned, too."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("name", [PLAIN.name, "gemma3-hub", "mllama-meta", "qwen2.5-vl"])
def test_a_model_that_one_thread_loaded_answers_in_another(name):
    """Nothing is left to be computed that belongs to the thread that loaded it."""
    ((model, processor),) = in_threads(lambda: load(GOLDEN / name))
    (there,) = in_threads(lambda: generate(model, processor, "What is it?", images=[PHOTO], max_tokens=4))
    assert there == generate(model, processor, "What is it?", images=[PHOTO], max_tokens=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_several_threads_equal_those_of_one(llava, temperature):
    def ask(number: int) -> str:
        prompt, images = QUESTIONS[number]
        return generate(*llava, prompt, images=images, max_tokens=12, temperature=temperature, seed=number)

    alone = [ask(number) for number in range(4)]
    assert len(set(alone)) == 4
    assert in_threads(*(lambda number=number: ask(number) for number in range(4))) == alone  # type: ignore[misc]


def test_one_step_at_a_time(llava):
    """While one thread computes a token no other one does, and they take turns."""
    inside, order = threading.Lock(), []

    def watch(_: mx.array, logits: mx.array) -> mx.array:
        assert inside.acquire(blocking=False), "two at once"
        order.append(threading.get_ident())
        time.sleep(0.002)
        inside.release()
        return logits

    def ask() -> str:
        begun.wait()
        said = ""
        for chunk in stream_generate(*llava, "What is it?", max_tokens=8, logits_processors=[watch]):
            said += chunk.text
            time.sleep(0.005)  # what is done with a token does not hold the others up
        return said

    begun = threading.Barrier(3)
    first, *others = in_threads(ask, ask, ask)
    assert isinstance(first, str) and others == [first, first]
    changes = sum(one != other for one, other in pairwise(order))
    assert len(order) == 24 and changes > 2


def test_each_token_may_be_asked_for_by_another_thread(llava):
    """As web servers do that run a generator in a pool of threads."""
    options = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}
    alone = [chunk.token for chunk in stream_generate(*llava, "What is it?", images=[PHOTO], **options)]
    steps = stream_generate(*llava, "What is it?", images=[PHOTO], **options)
    assert [in_threads(lambda: next(steps))[0].token for _ in alone] == alone


def test_a_conversation_is_one_threads(llava):
    chat, refused = Chat(*llava), []

    def meddle(logprobs: mx.array) -> mx.array:
        asked = (chat.undo, chat.fork, chat.clear, lambda: list(chat.send("Me, too")), lambda: chat.save("never.json"))
        refused.append(in_threads(*asked))
        return mx.argmax(logprobs, axis=-1)

    said = "".join(chunk.text for chunk in chat.send(["What is it?", PHOTO], max_tokens=3, sampler=meddle))
    assert len(refused) == 3
    for error in refused[0]:
        assert isinstance(error, PromptError) and "another thread is using this conversation" in str(error)
    assert said == generate(*llava, ["What is it?", PHOTO], max_tokens=3)
    assert len(chat.messages) == 2
    (later,) = in_threads(lambda: "".join(chunk.text for chunk in chat.send("And now?", max_tokens=3)))  # it is free
    fresh = Chat(*llava)
    fresh.messages = chat.messages[:2]
    assert later == "".join(chunk.text for chunk in fresh.send("And now?", max_tokens=3))


def on_metal(monkeypatch, default: mx.DeviceType, **info: int) -> None:
    """As on a Mac: `info` is its GPU's, of its CPU little is known."""

    def device_info(device: mx.Device | None = None) -> dict[str, Any]:
        kind = default if device is None else device.type
        return info if kind == mx.gpu else {"architecture": "arm64"}

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", device_info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(default))


@pytest.mark.parametrize("default", [mx.cpu, mx.gpu], ids=["CPU", "GPU"])
def test_without_a_limit_to_recommend_memory_is_not_wired(default, monkeypatch):
    """On a Mac's CPU, and where the GPU says nothing of the kind."""
    on_metal(monkeypatch, default, **({"max_recommended_working_set_size": 100} if default == mx.cpu else {}))
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit: pytest.fail(f"limit {limit}"))
    with wired_memory():
        pass


@pytest.fixture
def limits(monkeypatch):
    """The limits that a Mac's memory has: of what is wired, of buffers that nothing uses; all that were set."""
    limits = {"set_wired_limit": [5], "set_cache_limit": [9]}

    def set_limit(name: str, limit: int) -> int:
        limits[name].append(limit)
        return limits[name][-2]

    on_metal(monkeypatch, mx.gpu, max_recommended_working_set_size=80)
    monkeypatch.setenv(COMPILE, "0")
    for name in limits:
        monkeypatch.setattr(mx, name, partial(set_limit, name))
    return limits


def test_wired_memory_lasts_as_long_as_any_answer(llava, limits):
    one, other = (stream_generate(*llava, "Hello", max_tokens=4) for _ in range(2))
    next(one), next(other)
    list(one)
    assert limits == {"set_wired_limit": [5, 80, 80], "set_cache_limit": [9, 10, 10]}
    list(other)
    assert limits == {"set_wired_limit": [5, 80, 80, 5], "set_cache_limit": [9, 10, 10, 9]}


def test_memory_is_wired_once_for_many_answers(llava, limits):
    answers = batch_generate(*llava, ["Hello", "What?", "Why?"], max_tokens=4, batch_size=2)
    assert all(len(answer.token_ids) == 4 for answer in answers)
    assert limits["set_wired_limit"] == [5, 80, 5]
    with Engine(*llava, max_tokens=3) as engine:
        for _ in range(2):
            assert len(engine.submit("Hello").result().token_ids) == 3
    assert limits["set_wired_limit"] == [5, 80, 5, 80, 5, 80, 5]


def test_buffers_are_released_after_the_vision_tower(llava, limits, monkeypatch):
    released = []
    monkeypatch.setattr(mx, "clear_cache", lambda: released.append(1))
    list(stream_generate(*llava, "Hello", max_tokens=2))
    assert len(released) == 1  # at the answer's end
    list(stream_generate(*llava, "Hello", images=[PHOTO], max_tokens=2))
    assert len(released) == 3
