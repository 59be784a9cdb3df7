"""Tools over HTTP: OpenAI's and Ollama's forms of calls, whole and in streams."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from reference import GOLDEN

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from serving import Served, served
from thinking import script

from mlx_vlm_mini import load
from mlx_vlm_mini.generation.engine import Engine

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
SAID = 'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>'
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that says `SAID` to whatever it is asked."""
    folder = tmp_path_factory.mktemp("caller") / "qwen3.5"
    shutil.copytree(GOLDEN / "qwen3.5", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model, processor = load(folder, access="served")

    class Scripted(Engine):
        def submit(self, prompt: Any, **options: Any) -> Any:
            (end, *_) = processor.eos_token_ids
            said = script(processor.tokenizer, SAID, end)
            return super().submit(
                prompt, **{**options, "sampler": said["sampler"], "max_tokens": options["max_tokens"]}
            )

    with served({"caller": str(folder)}, lambda _: Scripted(model, processor)) as running:
        yield running


def post(server: Served, path: str, **body: Any) -> Any:
    with server.client() as client:
        return client.post(path, json={"messages": MESSAGES, "tools": [TOOL], **body})


def test_openais_calls(server):
    (choice,) = post(server, "/v1/chat/completions").json()["choices"]
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Wait."
    assert [(call["type"], call["function"]) for call in calls] == [
        ("function", {"name": "f", "arguments": '{"a": 1}'}),
        ("function", {"name": "g", "arguments": "{}"}),
    ]
    assert len({call["id"] for call in calls}) == 2 and not any("index" in call for call in calls)
    text = post(server, "/v1/chat/completions", stream=True).text
    choices = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    streamed = [call for each in choices for call in each["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in streamed] == [(0, "f"), (1, "g")]
    assert "".join(each["delta"].get("content", "") for each in choices) == "Wait."
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None}, {"tool_choice": "none"}])
def test_without_tools_all_is_text(server, fields):
    (choice,) = post(server, "/v1/chat/completions", **fields).json()["choices"]
    assert choice["message"]["content"] == SAID and choice["finish_reason"] == "stop"


def test_ollamas_calls(server):
    expected = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {}}}]
    message = post(server, "/api/chat", stream=False).json()["message"]
    assert message["tool_calls"] == expected and message["content"] == "Wait."
    lines = [json.loads(line) for line in post(server, "/api/chat").text.splitlines()]
    assert [call for line in lines for call in line["message"].get("tool_calls", [])] == expected
    with server.client() as client:
        assert "tools" in client.post("/api/show", json={"model": "caller"}).json()["capabilities"]


def test_calls_and_their_answers_go_back(server):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    found = post(server, "/v1/chat/completions", messages=messages)
    longer = post(server, "/v1/chat/completions", messages=[*MESSAGES, *messages])
    assert found.status_code == 200
    assert found.json()["usage"]["prompt_tokens"] < longer.json()["usage"]["prompt_tokens"]
    own = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    said = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": own},
        {"role": "tool", "tool_name": "f", "content": "2"},
    ]
    assert post(server, "/api/chat", messages=said, stream=False).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "x"}, "tools must be a list"),
        ({"tools": [{"type": "function"}]}, "tools[0] must be"),
        ({"tool_choice": "required"}, "tool_choice is auto or none"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice is auto or none"),
        ({"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [3]}]}, "tool_calls[0] must be"),
    ],
)
def test_what_is_refused(server, fields, message):
    response = post(server, "/v1/chat/completions", **fields)
    assert response.status_code == 400 and message in response.json()["error"]["message"]
