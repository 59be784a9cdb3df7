"""Ollama's interface: chat, generate, and what its clients ask about models."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mlx_vlm_mini import __version__
from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.generation.answering import Stats
from mlx_vlm_mini.text.tools import Call, ToolFilter

from .answers import Answers
from .limits import Limits
from .models import Model
from .questions import Question, read_ollama_chat, read_ollama_generate
from .refusals import Refusal, refuse
from .server import Server
from .streams import Stream

RUNNING = "Ollama is running"  # what its clients look for at the root
VERSION = "0.12.6"  # of Ollama's interface that is followed; clients compare it with what they need


async def running(server: Server, request: Request) -> Response:
    """`GET /` of a client that is no browser."""
    return PlainTextResponse(RUNNING)


async def version(server: Server, request: Request) -> Response:
    """`GET /api/version`."""
    return JSONResponse({"version": VERSION, "mlx_vlm_mini": __version__})


async def tags(server: Server, request: Request) -> Response:
    """`GET /api/tags`."""
    return JSONResponse({"models": [_tag(server, model) for model in server.models]})


async def running_models(server: Server, request: Request) -> Response:
    """`GET /api/ps`."""
    loaded = [model for model in server.models if model.engine is not None]
    never = datetime(9999, 12, 31, tzinfo=UTC).isoformat()
    return JSONResponse(
        {
            "models": [
                {**_tag(server, model), "expires_at": never, "size_vram": server.about(model).bytes} for model in loaded
            ]
        }
    )


async def show(server: Server, request: Request) -> Response:
    """`POST /api/show`."""
    async with server.bodies.read(request) as body:
        name = body.get("model") or body.get("name")
        if not isinstance(name, str):
            raise Refusal(400, "model must be a text")
        model = server.models.find(name)
    about = server.about(model)
    family = about.family
    info = {
        "general.architecture": family, "general.parameter_count": about.weights,
        f"{family}.context_length": about.context, f"{family}.embedding_length": about.hidden_size,
        f"{family}.block_count": about.layers,
    }  # fmt: skip
    return JSONResponse(
        {
            "modelfile": f"# mlx-vlm-mini\nFROM {model.name}\n",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _details(server, model),
            "model_info": info,
            "capabilities": [
                "completion",
                *(["vision"] if about.vision else []),
                *(["thinking"] if about.thinking else []),
                *(["tools"] if about.tools else []),
            ],
            "modified_at": _time(model.created),
        }
    )


async def chat(server: Server, request: Request) -> Response:
    """`POST /api/chat`."""
    return await _answer(server, request, read_ollama_chat, "chat")


async def generate(server: Server, request: Request) -> Response:
    """`POST /api/generate`."""
    return await _answer(server, request, read_ollama_generate, "generate")


async def _answer(
    server: Server, request: Request, read: Callable[[Mapping[str, Any], Limits], Question], kind: str
) -> Response:
    async with server.bodies.read(request) as body:
        question, keep_alive = read(body, server.limits), body.get("keep_alive")
        body.clear()
        if not question.messages:  # nothing is asked: the model is loaded, to answer sooner
            model = server.models.find(question.model)
            leaves = keep_alive in (0, "0", "0s")
            await (server.models.unload(model) if leaves else server.models.load(model))
            return JSONResponse({**_said(model, kind, ""), "done": True, "done_reason": "unload" if leaves else "load"})
        answers = await server.desk.ask(question, request.receive)
    if question.stream:
        return Stream(answers, _lines(answers, kind), "application/x-ndjson", request.scope)
    async with answers:
        chunks = [found[1] async for found in answers if found is not None]
        text, thinking = "".join(chunk.text for chunk in chunks), "".join(chunk.thinking for chunk in chunks)
        calls: list[Call] = []
        if question.tools:
            tools = ToolFilter(question.tools)
            parts = [tools.add(text), tools.finish()]
            text, calls = "".join(part for part, _ in parts), [call for _, found in parts for call in found]
        request.scope["note"] = answers.note
        return JSONResponse({**_said(answers.model, kind, text, thinking, calls), **_end(answers)})


async def _lines(answers: Answers, kind: str) -> AsyncIterator[bytes]:
    """Lines of JSON; an empty text is a sign of life, an error has a line of its own."""
    tools = ToolFilter(answers.question.tools) if answers.question.tools else None
    try:
        async for found in answers:
            text, thinking = ("", "") if found is None else (found[1].text, found[1].thinking)
            calls: list[Call] = []
            if found is not None and tools is not None:
                text, calls = tools.add(text)
                if found[1].finish_reason is not None:
                    rest, last = tools.finish()
                    text, calls = text + rest, calls + last
            if found is None or text or thinking or calls:
                yield _line({**_said(answers.model, kind, text, thinking, calls), "done": False})
        yield _line({**_said(answers.model, kind, ""), **_end(answers)})
    except VLMError as error:
        yield _line(refuse(error).as_ollama())
    except Refusal as refusal:
        yield _line(refusal.as_ollama())


def _said(model: Model, kind: str, text: str, thinking: str = "", calls: Sequence[Call] = ()) -> dict[str, Any]:
    more: dict[str, Any] = {"thinking": thinking} if thinking else {}
    if calls:
        more["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    chat = {"message": {"role": "assistant", "content": text, **more}}
    said = chat if kind == "chat" else {"response": text, **more}
    return {"model": model.name, "created_at": datetime.now(UTC).isoformat(), **said}


def _end(answers: Answers) -> dict[str, Any]:
    """Why an answer ended and what it cost, times in nanoseconds."""
    (answer,) = answers.answers
    stats = answer.stats or Stats()
    seconds = {
        "total_duration": stats.first_token_s + stats.decode_s, "load_duration": 0.0,
        "prompt_eval_duration": stats.prefill_s + stats.image_s, "eval_duration": stats.decode_s,
    }  # fmt: skip
    return {
        "done": True, "done_reason": answer.finish_reason,
        "prompt_eval_count": stats.prompt_tokens, "eval_count": stats.generated_tokens,
        **{name: int(value * 1e9) for name, value in seconds.items()},
    }  # fmt: skip


def _tag(server: Server, model: Model) -> dict[str, Any]:
    about = server.about(model)
    digest = hashlib.sha256(f"{model.name} {about.bytes} {about.weights}".encode()).hexdigest()
    return {
        "name": model.name, "model": model.name, "modified_at": _time(model.created), "size": about.bytes,
        "digest": digest, "details": _details(server, model),
    }  # fmt: skip


def _details(server: Server, model: Model) -> dict[str, Any]:
    about = server.about(model)
    return {
        "parent_model": "", "format": about.format, "family": about.family, "families": [about.family],
        "parameter_size": about.size, "quantization_level": about.quantization,
    }  # fmt: skip


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
