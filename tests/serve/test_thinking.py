"""Thinking over HTTP: OpenAI's `reasoning_content`, Ollama's `thinking`, and the switches that clients send."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from reference import GOLDEN

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import shutil

from serving import Served, engine_of, served
from thinking import write_template

from mlx_vlm_mini import load, stream_generate

MESSAGES = [{"role": "user", "content": "Hi"}]
SWITCHES = [
    ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "high"}, True), ({"reasoning": {"effort": "low"}}, True),
    ({"enable_thinking": False}, False), ({"chat_template_kwargs": {"enable_thinking": False}}, False), ({}, True),
    ({"reasoning_effort": None, "chat_template_kwargs": {}}, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """It thinks by default, and with so few tokens never ends to."""
    folder = tmp_path_factory.mktemp("thinker") / "qwen3.5"
    shutil.copytree(GOLDEN / "qwen3.5", folder)
    write_template(folder, "on by default")
    return folder, load(folder, access="served")


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Served]:
    folder, loaded = model
    with served({"thinker": str(folder)}, lambda _: engine_of(*loaded)) as running:
        yield running


def own(model: Any, think: bool | None = None) -> tuple[str, str]:
    chunks = [*stream_generate(*model[1], MESSAGES, max_tokens=6, think=think)]
    return "".join(chunk.thinking for chunk in chunks), "".join(chunk.text for chunk in chunks)


def post(server: Served, path: str, **body: Any) -> Any:
    with server.client() as client:
        return client.post(path, json={"messages": MESSAGES, **body})


@pytest.mark.parametrize(("fields", "think"), SWITCHES, ids=lambda value: str(value))
def test_openais_form(server, model, fields, think):
    thinking, text = own(model, think)
    assert bool(thinking) is think and bool(text) is not think
    found = post(server, "/v1/chat/completions", max_tokens=6, **fields).json()
    message = found["choices"][0]["message"]
    assert (message.get("reasoning_content", ""), message["content"]) == (thinking, text)
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == (6 if think else 0)
    response = post(server, "/v1/chat/completions", max_tokens=6, stream=True, **fields)
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in response.text.splitlines() if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thinking
    assert "".join(delta.get("content", "") for delta in deltas) == text


@pytest.mark.parametrize(("think", "expected"), [(None, True), (True, True), (False, False), ("low", True)])
def test_ollamas_form(server, model, think, expected):
    thinking, text = own(model, expected)
    for path, fields in (("/api/chat", {}), ("/api/generate", {"prompt": "Hi"})):
        for stream in (False, True):
            response = post(server, path, think=think, stream=stream, options={"num_predict": 6}, **fields)
            lines = [json.loads(line) for line in response.text.splitlines()]
            parts = [line.get("message", line) for line in lines]
            assert "".join(part.get("thinking", "") for part in parts) == thinking
            assert "".join(part.get("content", part.get("response", "")) for part in parts) == text
    with server.client() as client:
        assert "thinking" in client.post("/api/show", json={"model": "thinker"}).json()["capabilities"]


def test_what_was_thought_before_goes_back(server, model):
    said = [*MESSAGES, {"role": "assistant", "content": "Hello", "reasoning_content": "They greet."}, *MESSAGES]
    lengths = []
    for key in ("reasoning_content", "reasoning", "thinking", "unknown"):
        answer = {"role": "assistant", "content": "Hello", key: "They greet."}
        found = post(server, "/v1/chat/completions", messages=[MESSAGES[0], answer, MESSAGES[0]], max_tokens=1).json()
        lengths.append(found["usage"]["prompt_tokens"])
    assert lengths == [len(model[1][1](said).slots)] * 3 + [lengths[3]]


def test_switches_that_are_none(server):
    for fields, message in (
        ({"reasoning_effort": "much"}, "reasoning_effort must be one of none"),
        ({"enable_thinking": "yes"}, "enable_thinking must be true or false"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "enable_thinking must be true or false"),
    ):
        response = post(server, "/v1/chat/completions", **fields)
        assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_model_that_does_not_think_takes_an_effort_and_refuses_an_order():
    from checkpoints import PLAIN

    with served({"plain": str(PLAIN)}, lambda _: engine_of(*load(PLAIN))) as running:
        for effort in ("none", "high"):
            assert post(running, "/v1/chat/completions", reasoning_effort=effort, max_tokens=2).status_code == 200
        refused = post(running, "/v1/chat/completions", enable_thinking=True, max_tokens=2)
        assert refused.status_code == 400 and "no switch for thinking" in refused.json()["error"]["message"]
