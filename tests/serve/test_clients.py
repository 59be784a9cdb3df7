"""Real clients against a real server: openai-python, ollama-python, llm and langchain-openai, each as its users call it."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from serving import Served, data_url, engine_of, served

from mlx_vlm_mini import load
from mlx_vlm_mini.serve.limits import Limits

pytestmark = pytest.mark.reference

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
QUESTION = "What do you see?"
ANSWER = (
    "A large red circle at the top left, a small yellow star at the top right and a large blue square at the bottom."
)
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
KEY = "a key"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = Limits(max_tokens=100, images=5)
    with served({"demo": "demo"}, lambda _: engine_of(*load("demo"), context=1500), limits=limits, key=KEY) as running:
        yield running


def asked(text: str = QUESTION) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": data_url(SCENE, "image/png")}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


class TestOpenAI:
    @pytest.fixture
    def client(self, server: Served) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").object == "model"

    def test_a_picture(self, client):
        found = client.chat.completions.create(model="demo", messages=asked())
        assert found.choices[0].message.content == ANSWER and found.choices[0].finish_reason == "stop"
        assert found.usage.prompt_tokens_details.cached_tokens >= 0 and found.usage.total_tokens > 64

    def test_a_stream(self, client):
        chunks = [
            *client.chat.completions.create(
                model="demo", messages=asked(), stream=True, stream_options={"include_usage": True}
            )
        ]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        assert chunks[-1].usage.completion_tokens > 10 and not chunks[-1].choices

    def test_the_helper_for_streams(self, client):
        with client.chat.completions.stream(model="demo", messages=asked()) as stream:
            kinds = {event.type for event in stream}
        assert "content.delta" in kinds and stream.get_final_completion().choices[0].message.content == ANSWER

    def test_a_schema_and_a_class(self, client):
        form = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA, "strict": True}}
        found = json.loads(
            client.chat.completions.create(model="demo", messages=asked(), response_format=form)
            .choices[0]
            .message.content
        )
        assert found["colour"] in ("red", "green") and 0 <= found["count"] <= 9
        pydantic = pytest.importorskip("pydantic")
        scene = pydantic.create_model("Scene", count=(int, pydantic.Field(ge=0, le=9)))
        parsed = (
            client.chat.completions.parse(model="demo", messages=asked("How many?"), response_format=scene)
            .choices[0]
            .message.parsed
        )
        assert isinstance(parsed.count, int)

    def test_logprobs_and_several_answers(self, client):
        found = client.chat.completions.create(
            model="demo", messages=asked(), logprobs=True, n=2, temperature=1.0, seed=3
        )
        assert len(found.choices) == 2 and all(token.logprob <= 0 for token in found.choices[0].logprobs.content)

    def test_errors_are_its_classes(self, client, server):
        import openai

        for kind, fields in (
            (openai.NotFoundError, {"model": "gpt-4o"}),
            (
                openai.BadRequestError,
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}
                    ]
                },
            ),
            (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
            (openai.BadRequestError, {"messages": [{"role": "user", "content": "long " * 3000}]}),
        ):
            for stream in (False, True):
                with pytest.raises(kind) as found:
                    client.chat.completions.create(**{"model": "demo", "messages": asked(), "stream": stream, **fields})
                assert found.value.body["message"] and len(found.value.body["message"]) > 10
        assert found.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError, match="a key is missing or wrong"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()

    def test_an_error_in_mid_stream_is_raised_with_its_message(self, client, server):
        import openai

        (one,) = server.server.models
        client.chat.completions.create(model="demo", messages=asked(), max_tokens=1)
        own, steps = one.engine._batch.step, []

        def fail_later() -> Any:
            steps.append(1)
            return own() if len(steps) < 6 else 1 / 0

        one.engine._batch.step = fail_later
        try:
            with pytest.raises(openai.APIError, match="the engine failed"):
                list(client.chat.completions.create(model="demo", messages=asked(), stream=True))
        finally:
            one.engine._batch.step = own

    def test_a_stream_that_is_closed_ends_the_answer(self, client, server):
        (one,) = server.server.models
        stream = client.chat.completions.create(
            model="demo", messages=asked(), stream=True, temperature=50, seed=1, max_tokens=1300
        )
        next(iter(stream))
        stream.close()
        until = time.monotonic() + 5
        while server.server.desk.busy or one.engine._batch.busy:
            assert time.monotonic() < until
            time.sleep(0.01)

    def test_many_at_once_and_one_that_is_cancelled(self, server):
        openai = pytest.importorskip("openai")

        async def run() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
                tasks = [
                    asyncio.create_task(client.chat.completions.create(model="demo", messages=asked()))
                    for _ in range(9)
                ]
                await asyncio.sleep(0.02)
                tasks[4].cancel()
                return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(run())
        assert isinstance(found.pop(4), asyncio.CancelledError)
        assert [answer.choices[0].message.content for answer in found] == [ANSWER] * 8

    def test_a_conversation(self, client):
        messages = asked()
        first = client.chat.completions.create(model="demo", messages=messages)
        messages += [first.choices[0].message, {"role": "user", "content": "And now?"}]
        usage = client.chat.completions.create(model="demo", messages=messages).usage
        assert usage.prompt_tokens_details.cached_tokens > 64


class TestOllama:
    @pytest.fixture
    def client(self, server: Served) -> Any:
        ollama = pytest.importorskip("ollama")
        return ollama.Client(host=server.url, headers={"Authorization": f"Bearer {KEY}"})

    def test_models(self, client):
        assert [model.model for model in client.list().models] == ["demo"]
        assert client.show("demo").capabilities == ["completion", "vision"]
        client.generate("demo")
        assert [model.model for model in client.ps().models] == ["demo"]

    def test_chat_and_generate(self, client):
        messages = [{"role": "user", "content": QUESTION, "images": [str(SCENE)]}]
        assert client.chat("demo", messages).message.content == ANSWER
        parts = [*client.chat("demo", messages, stream=True)]
        assert (
            "".join(part.message.content for part in parts) == ANSWER and parts[-1].done and parts[-1].eval_count > 10
        )
        raw = base64.b64encode(SCENE.read_bytes()).decode()
        assert client.generate("demo", QUESTION, images=[raw]).response == ANSWER
        assert "".join(part.response for part in client.generate("demo", QUESTION, images=[raw], stream=True)) == ANSWER

    def test_a_schema(self, client):
        messages = [{"role": "user", "content": QUESTION, "images": [str(SCENE)]}]
        assert json.loads(client.chat("demo", messages, format=SCHEMA).message.content)["colour"] in ("red", "green")
        whole = client.chat("demo", messages, format="json", options={"num_predict": 60})
        assert whole.message.content.startswith("{") and whole.done_reason in ("stop", "length")

    def test_errors(self, client):
        ollama = pytest.importorskip("ollama")
        with pytest.raises(ollama.ResponseError, match="llama3 is not served here") as found:
            client.chat("llama3", [{"role": "user", "content": "Hi"}])
        assert found.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="takes no tools"):
            client.chat(
                "demo",
                [{"role": "user", "content": "Hi"}],
                tools=[{"type": "function", "function": {"name": "f", "description": "d"}}],
            )


def test_llm_with_an_attachment(server, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: demo\n  api_base: {server.url}/v1\n  api_key_name: local\n  vision: true\n  supports_schema: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"local": KEY}))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name("llm"), *words], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run("-m", "local", QUESTION, "-a", str(SCENE)) == ANSWER
    assert run("-m", "local", QUESTION, "-a", str(SCENE), "--no-stream") == ANSWER
    assert run("-c", "And now?")
    assert json.loads(run("-m", "local", QUESTION, "-a", str(SCENE), "--schema", json.dumps(SCHEMA)))["colour"] in (
        "red",
        "green",
    )


class TestLangChain:
    @pytest.fixture
    def model(self, server: Served) -> Any:
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

    def test_a_picture_and_a_stream(self, model):
        found = model.invoke(asked())
        assert found.content == ANSWER and found.usage_metadata["input_tokens"] > 64
        assert "".join(chunk.content for chunk in model.stream(asked())) == ANSWER
        standard = [{"role": "user", "content": [
            {"type": "text", "text": QUESTION},
            {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": base64.b64encode(SCENE.read_bytes()).decode()},
        ]}]  # fmt: skip
        assert model.invoke(standard).content == ANSWER

    def test_a_schema(self, model):
        found = model.with_structured_output({"title": "scene", **SCHEMA}, method="json_schema", strict=True).invoke(
            asked()
        )
        assert found["colour"] in ("red", "green")

    def test_many(self, model):
        assert [found.content for found in model.batch([asked()] * 4)] == [ANSWER] * 4
