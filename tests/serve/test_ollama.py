"""Ollama's interface: its answers are the library's, in its form."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import PHOTO, PLAIN

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from serving import Served, data_url, engine_of, served

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.serve.limits import Limits

RAW = base64.b64encode(PHOTO.read_bytes()).decode()


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load(PLAIN, access="served")


@pytest.fixture(scope="module")
def server(model: tuple[Any, Any]) -> Iterator[Served]:
    limits = Limits(max_tokens=9, images=2)
    with served({"tiny": str(PLAIN)}, lambda _: engine_of(*model, context=400), limits=limits) as running:
        yield running


def post(server: Served, path: str, **body: Any) -> Any:
    with server.client() as client:
        return client.post(path, json={"model": "tiny", **body})


def text_of(model: tuple[Any, Any], prompt: Any, **options: Any) -> str:
    return "".join(chunk.text for chunk in stream_generate(*model, prompt, **{"max_tokens": 9, **options}))


@pytest.mark.parametrize("image", [RAW, data_url(PHOTO)], ids=["raw", "url"])
def test_a_chat_streams_lines_unless_it_is_asked_not_to(server, model, image):
    own = text_of(model, [PHOTO.read_bytes(), "What?"])
    messages = [{"role": "user", "content": "What?", "images": [image]}]
    response = post(server, "/api/chat", messages=messages)
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == own and not any(line["done"] for line in lines)
    assert last["done"] and last["done_reason"] in ("stop", "length") and last["message"]["content"] == ""
    assert last["eval_count"] > 0 and last["prompt_eval_count"] > last["eval_count"] and last["total_duration"] > 1000
    whole = post(server, "/api/chat", messages=messages, stream=False).json()
    assert whole["message"] == {"role": "assistant", "content": own} and whole["done"] and whole["model"] == "tiny"
    assert whole["created_at"].endswith("+00:00")


def test_generate(server, model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {
        "temperature": 0.9,
        "seed": 4,
        "num_predict": 5,
        "top_p": 0.8,
        "top_k": 50,
        "repeat_penalty": 1.1,
        "num_ctx": 4096,
        "num_gpu": 1,
    }
    own = text_of(model, messages, temperature=0.9, seed=4, max_tokens=5, top_p=0.8, top_k=50, repetition_penalty=1.1)
    found = post(
        server,
        "/api/generate",
        prompt="Hi",
        system="Be brief.",
        stream=False,
        options=options,
        think=False,
        format="",
        keep_alive="5m",
    ).json()
    assert found["response"] == own and "message" not in found
    shown = post(
        server, "/api/generate", prompt="What?", images=[RAW], stream=False, options={"num_predict": -1}
    ).json()
    assert shown["response"] == text_of(model, [PHOTO.read_bytes(), "What?"])
    lines = [json.loads(line) for line in post(server, "/api/generate", prompt="Hi").text.splitlines()]
    assert "".join(line["response"] for line in lines) == text_of(model, "Hi")


def test_an_answer_in_a_form(server):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    found = post(
        server,
        "/api/chat",
        messages=[{"role": "user", "content": "Hi"}],
        stream=False,
        format=schema,
        options={"num_predict": 60},
    ).json()
    assert json.loads(found["message"]["content"])["n"] in (1, 2)


def test_a_request_without_a_prompt_loads_the_model(server):
    for path in ("/api/chat", "/api/generate"):
        assert post(server, path).json()["done_reason"] == "load"
    with server.client() as client:
        (loaded,) = client.get("/api/ps").json()["models"]
    assert loaded["name"] == "tiny" and loaded["size_vram"] == loaded["size"] > 0


def test_what_clients_ask_about_models(server):
    with server.client() as client:
        (tag,) = client.get("/api/tags").json()["models"]
        assert (
            tag["name"] == tag["model"] == "tiny" and tag["details"]["family"] == "llava" and len(tag["digest"]) == 64
        )
        assert client.get("/api/version").json()["version"].count(".") == 2
        assert client.get("/").text == "Ollama is running"
        for field in ("model", "name"):
            shown = client.post("/api/show", json={field: "tiny:latest"}).json()
        assert shown["capabilities"] == ["completion", "vision"] and shown["details"] == tag["details"]
        assert shown["model_info"]["llava.context_length"] > 0


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/chat", {"messages": "x"}, 400, "messages must be a list"),
        ("/api/chat", {"messages": [{"role": "user", "content": 3}]}, 400, "must be a text"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["?"]}]}, 400, "not valid base64"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["/etc/passwd"]}]}, 400, ""),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [RAW] * 3}]}, 400, "the limit is 2"),
        ("/api/chat", {"model": "llama3"}, 404, "llama3 is not served here"),
        ("/api/generate", {"prompt": "x", "options": {"temperature": "hot"}}, 400, "temperature must be a number"),
        ("/api/generate", {"prompt": "x", "options": {"mirostat": 2}}, 400, "options.mirostat is not supported"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
        ("/api/generate", {"prompt": "x", "format": 3}, 400, "format must be"),
        ("/api/generate", {"prompt": ["x"]}, 400, "prompt must be a text"),
        ("/api/show", {"model": 3}, 400, "model must be a text"),
        ("/api/pull", {"model": "x"}, 404, "there is nothing at /api/pull"),
    ],
)
def test_errors_are_ollamas(server, path, body, status, message):
    response = post(server, path, **body)
    assert response.status_code == status and list(response.json()) == ["error"]
    assert message in response.json()["error"]
