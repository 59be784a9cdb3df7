"""OpenAI's interface by a real server on loopback: the library's answers in OpenAI's form, and errors in it."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from serving import Served, data_url, engine_of, served

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.serve.limits import Limits

LIMITS = Limits(
    body=2**20, bodies=3 * 2**20, depth=20, images=3, choices=3, queue=2, silence=5, ping=0.2, linger=0.5, max_tokens=12
)
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load(PLAIN, access="served")


@pytest.fixture(scope="module")
def server(model: tuple[Any, Any]) -> Iterator[Served]:
    with served({"tiny": str(PLAIN)}, lambda _: engine_of(*model, context=400), limits=LIMITS) as running:
        yield running


def ask(server: Served, messages: Any = HI, **fields: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})


def events(text: str) -> list[Any]:
    """The data of a stream, which ends as it should."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def about(file: Any, text: str = "What?") -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": data_url(file, "image/png"), "detail": "auto"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def expected(model: tuple[Any, Any], prompt: Any, **options: Any) -> list[Any]:
    return [*stream_generate(*model, prompt, **{"max_tokens": 12, **options})]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_an_answer_is_the_librarys(server, model):
    own = expected(model, [PHOTO.read_bytes(), "What?"])
    found = ask(server, about(PHOTO)).json()
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion" and found["model"] == "tiny" and found["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": text_of(own), "refusal": None}
    assert choice["finish_reason"] == own[-1].finish_reason and choice["logprobs"] is None
    stats = own[-1].stats
    assert found["usage"]["prompt_tokens"] == stats.prompt_tokens
    assert found["usage"]["completion_tokens"] == stats.generated_tokens
    assert found["usage"]["prompt_tokens_details"]["image_tokens"] == stats.image_tokens > 0


def test_a_stream_says_the_role_first_then_the_text_the_reason_and_the_cost(server, model):
    own = expected(model, [PHOTO.read_bytes(), "Why?"])
    response = ask(server, about(PHOTO, "Why?"), stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(
        {chunk["id"] for chunk in chunks}
    ) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == text_of(own)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        own[-1].finish_reason
    ]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(own)
    plain = events(ask(server, stream=True).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)


def test_options_reach_the_model(server, model):
    own = expected(model, "Hi", temperature=0.9, seed=2**64 - 3, max_tokens=7, top_p=0.8, repetition_penalty=1.2)
    found = ask(
        server, temperature=0.9, seed=-3, max_completion_tokens=7, max_tokens=3, top_p=0.8, repetition_penalty=1.2
    ).json()
    assert found["choices"][0]["message"]["content"] == text_of(own)
    many = ask(server, n=3, temperature=1.0, seed=5).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2]
    for number, choice in enumerate(many["choices"]):
        assert choice["message"]["content"] == text_of(expected(model, "Hi", temperature=1.0, seed=5 + number))
    stop = next(char for char in text_of(expected(model, "Hi"))[1:] if char.isalpha())
    stopped = ask(server, stop=stop).json()["choices"][0]
    assert stop not in stopped["message"]["content"] and stopped["finish_reason"] == "stop"


def test_log_probabilities(server, model):
    own = [chunk for chunk in expected(model, "Hi") if chunk.token not in model[1].eos_token_ids]
    whole = ask(server, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in whole] == pytest.approx([chunk.logprob for chunk in own], abs=1e-4)
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in whole)
    streamed = [
        token
        for chunk in events(ask(server, logprobs=True, stream=True).text)
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [token["token"] for token in streamed] == [token["token"] for token in whole]


def test_an_answer_in_a_form(server):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    found = ask(server, about(PHOTO), response_format=form, max_tokens=60).json()["choices"][0]
    assert found["finish_reason"] == "stop" and json.loads(found["message"]["content"])["colour"] in ("red", "blue")
    broken = ask(server, response_format={"type": "json_schema", "json_schema": {"schema": {"not": {}}}})
    assert broken.status_code == 400 and '"not" cannot be enforced' in broken.json()["error"]["message"]


def test_what_clients_send_beside_is_left_out(server, model):
    own = text_of(expected(model, [{"role": "system", "content": "Be brief."}, *HI]))
    fields = {
        "prediction": {"type": "content", "content": "x"}, "user": "me", "store": True, "parallel_tool_calls": True, "tools": [],
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "top_logprobs": 0, "metadata": {"a": 1},
        "response_format": {"type": "text"}, "functions": None, "stop": None, "seed": None, "modalities": ["text"],
    }  # fmt: skip
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": "x"},
        {**HI[0], "name": "me", "audio": None},
    ]
    assert ask(server, messages, **fields).json()["choices"][0]["message"]["content"] == own


def test_pictures_in_every_form_that_clients_send(server, model):
    own = text_of(expected(model, [PHOTO.read_bytes(), "What?"]))
    url, text = data_url(PHOTO), {"type": "text", "text": "What?"}
    for part in (
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}, "text": "a stray key"},
        {"type": "input_image", "image_url": url},
        {"type": "file", "file": {"filename": "a.jpg", "file_data": url}},
    ):
        assert (
            ask(server, [{"role": "user", "content": [part, text]}]).json()["choices"][0]["message"]["content"] == own
        )
    buffer = io.BytesIO()
    pages = [Image.new("RGB", (60, 90), colour) for colour in ("red", "blue", "green", "black")]
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:2])
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": data_url_of(buffer.getvalue())}}
    found = ask(server, [{"role": "user", "content": [file, text]}]).json()
    assert (
        found["usage"]["prompt_tokens_details"]["image_tokens"]
        == 2 * expected(model, [PHOTO.read_bytes(), "a"])[-1].stats.image_tokens
    )
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:])
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": data_url_of(buffer.getvalue())}}
    many = ask(server, [{"role": "user", "content": [file, text]}])
    assert many.status_code == 400 and "more than 3 pictures" in many.json()["error"]["message"]


def data_url_of(pdf: bytes) -> str:
    return f"data:application/pdf;base64,{base64.b64encode(pdf).decode()}"


def test_a_conversation_that_comes_whole_is_read_from_where_it_was(server):
    first = about(SHAPES)
    said = ask(server, first).json()
    again = [*first, said["choices"][0]["message"], {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    usage = ask(server, again).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens_details"]["image_tokens"] > 0


SHORT = {"role": "user", "content": "x"}
BAD: list[tuple[Any, int, str, str | None]] = [
    ({"messages": []}, 400, "one message or more", "messages"),
    ({"messages": "Hi"}, 400, "must be a list", "messages"),
    ({"messages": [{"content": "Hi"}]}, 400, "messages[0] must be an object with a role", "messages[0]"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content must be a text", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}]}, 400, "is of type 'video_url'", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "has no url", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/passwd"}]}]}, 400, "files are not opened here", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]}, 400, "files are not opened here", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1/a"}]}]}, 400, "addresses are not opened here", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,////"}]}]}, 400, "is not an image", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, 400, "and none are kept here", "messages[0].content[0]"),
    ({"messages": [SHORT], "model": "gpt-4o"}, 404, "gpt-4o is not served here: choose tiny", "model"),
    ({"messages": [SHORT], "model": 4}, 400, "model must be a text", "model"),
    ({"messages": [SHORT], "temperature": "hot"}, 400, "temperature must be a number", "temperature"),
    ({"messages": [SHORT], "top_p": 7}, 400, "top_p must be between", "top_p"),
    ({"messages": [SHORT], "max_completion_tokens": 0}, 400, "max_completion_tokens must be 1 or more", "max_completion_tokens"),
    ({"messages": [SHORT], "n": 4}, 400, "n must be a whole number from 1 to 3", "n"),
    ({"messages": [SHORT], "stream": "yes"}, 400, "stream must be true or false", "stream"),
    ({"messages": [SHORT], "stop": ["a"] * 17}, 400, "the limit is 16", "stop"),
    ({"messages": [SHORT], "top_logprobs": 3}, 400, "top_logprobs is not supported", "top_logprobs"),
    ({"messages": [SHORT], "frequency_penalty": 0.5}, 400, "frequency_penalty is not supported", "frequency_penalty"),
    ({"messages": [SHORT], "tools": [{"type": "function"}]}, 400, "tools[0] must be", "tools"),
    ({"messages": [SHORT], "response_format": {"type": "xml"}}, 400, "response_format must be", "response_format"),
    ({"messages": [{"role": "user", "content": "x " * 500}]}, 400, "the model's context is 400", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message", "param"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(server, body, status, message, param, stream):
    """Also where a stream was asked for: nothing of it was sent yet."""
    with server.client() as client:
        response = client.post("/v1/chat/completions", json={"stream": stream, **body})
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"] and error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if status == 404:
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON"), (b"{", "no JSON"), (b"[]", "must be a JSON object"), (b"\xff\xfe{}", "not UTF-8"), (b"\0", "no JSON"),
        (b'{"messages": NaN}', "NaN is no number"), (b'{"n":' + b"9" * 5000 + b"}", "no JSON"), (b"[" * 100_000, "inside one another"),
        (b'{"a":' * 30 + b"1" + b"}" * 30, "more than 20 lists"), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
    ],
)  # fmt: skip
def test_bodies_that_are_none(server, data, message):
    with server.client() as client:
        response = client.post("/v1/chat/completions", content=data)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_large_bodies_are_refused_unread(server):
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    with server.client() as client:
        for content in (b" " * (2**20 + 1), endless()):
            response = client.post("/v1/chat/completions", content=content)
            assert response.status_code == 413 and "larger than 1 MiB" in response.json()["error"]["message"]
        assert client.get("/health").json()["status"] == "ok"
    assert server.server.bodies.held == 0


def test_paths_methods_and_lists(server):
    with server.client() as client:
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed["id"] == "tiny" and client.get("/v1/models/tiny").json() == listed
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
        response = client.get("/v1/chat/completions")
        assert response.status_code == 405 and response.headers["allow"] == "POST"
        assert client.head("/health").status_code == 200 and client.head("/health").text == ""
        assert ask(server).status_code == 200
        counted = client.get("/metrics").text
        assert 'mlx_vlm_mini_requests_total{route="/v1/models",status="200"}' in counted
        assert 'mlx_vlm_mini_tokens_total{kind="generated",model="tiny"}' in counted


def wait_until(true: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def slow(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Steps of the model wait for this event, set at the end."""
    go = threading.Event()
    assert ask(server, max_tokens=1).status_code == 200  # it is loaded
    (one,) = server.server.models
    batch = one.engine._batch  # type: ignore[union-attr]
    own = batch.step
    monkeypatch.setattr(batch, "step", lambda: (go.wait(20), own())[1])
    yield go
    go.set()
    wait_until(lambda: server.server.desk.busy == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_its_answer(server, slow, stream):
    (one,) = server.server.models
    body = json.dumps({"messages": HI, "stream": stream}).encode()
    place = httpx.URL(server.url)
    with socket.create_connection((place.host, place.port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: server.server.desk.busy == 1)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    wait_until(lambda: server.server.desk.busy == 0)  # while a step is being computed
    slow.set()
    wait_until(lambda: not one.engine._batch.busy)
    wait_until(lambda: "POST /v1/chat/completions" in server.log[-1] and "the client left" in server.log[-1])


def test_more_requests_than_the_queue_holds_come_later(server, slow):
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(ask(server).status_code)) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.server.desk.busy == 6)
    refused = ask(server)
    assert (
        refused.status_code == 429
        and refused.headers["retry-after"] == "2"
        and refused.json()["error"]["code"] == "queue_full"
    )
    slow.set()
    for thread in threads:
        thread.join()
    assert codes == [200] * 6


def test_a_stream_of_a_model_that_is_silent_has_signs_of_life(server, slow):
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json={"messages": HI, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        slow.set()
        assert [*lines][-2] == "data: [DONE]"


def test_an_error_in_mid_stream_is_an_event(server, slow, monkeypatch):
    (one,) = server.server.models
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json={"messages": HI, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        own = one.engine._batch.step
        monkeypatch.setattr(one.engine._batch, "step", lambda: 1 / 0)
        slow.set()
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        monkeypatch.setattr(one.engine._batch, "step", own)
    assert told[-1]["error"]["type"] == "server_error" and "the engine failed" in told[-1]["error"]["message"]
    assert ask(server).status_code == 200


def test_logs_hold_nothing_that_was_said(server):
    secret = "Rumpelstilzchen"
    ask(server, [{"role": "user", "content": secret}])
    ask(server, [{"role": secret, "content": [{"type": secret}]}])
    with server.client() as client:
        client.get(f"/v1/models?key={secret}")
    assert len(server.log) > 3 and not any(secret in line for line in server.log)
    assert any("POST /v1/chat/completions 200" in line and "tokens" in line for line in server.log)
