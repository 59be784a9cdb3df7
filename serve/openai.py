"""OpenAI's interface: chat completions, whole and as server-sent events, and the list of models."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.generation.answering import Chunk, Stats
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.tools import ToolFilter

from .answers import Answer, Answers
from .models import Model
from .questions import read_chat
from .refusals import Refusal, refuse
from .server import Server
from .streams import Stream

DONE = b"data: [DONE]\n\n"
PING = b": the model is reading\n\n"


def describe(model: Model) -> dict[str, Any]:
    """A model in the list."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "mlx-vlm-mini"}


async def models(server: Server, request: Request) -> Response:
    """`GET /v1/models`."""
    return JSONResponse({"object": "list", "data": [describe(model) for model in server.models]})


async def model(server: Server, request: Request) -> Response:
    """`GET /v1/models/{id}`; an id may have slashes."""
    return JSONResponse(describe(server.models.find(request.path_params["name"])))


async def chat(server: Server, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    async with server.bodies.read(request) as body:
        question = read_chat(body, server.limits)
        body.clear()
        answers = await server.desk.ask(question, request.receive)
    reply = _Reply(answers)
    if question.stream:
        return Stream(answers, reply.events(), "text/event-stream", request.scope)
    async with answers:
        async for found in answers:
            if found is not None:
                reply.add(*found)
        request.scope["note"] = answers.note
        return JSONResponse(reply.whole())


class _Reply:
    """Answers in the form of a chat completion."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self._question = answers, answers.question
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": answers.model.name,
        }  # fmt: skip
        self._filters = [ToolFilter(self._question.tools) for _ in answers.answers]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in answers.answers]
        self._texts = [""] * len(answers.answers)
        self._thinking = [""] * len(answers.answers)
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in answers.answers]
        self._begun: set[int] = set()

    def add(self, number: int, chunk: Chunk) -> None:
        """Keep a chunk for the whole answer."""
        self._texts[number] += self._told(number, chunk)[0]
        self._thinking[number] += chunk.thinking
        self._logprobs[number] += self._logprobs_of(chunk)

    def whole(self) -> dict[str, Any]:
        """All that was kept."""
        choices = [
            {
                "index": number,
                "message": {
                    "role": "assistant",
                    "content": text if text or not calls else None,
                    "refusal": None,
                    **({"tool_calls": [_without_index(call) for call in calls]} if calls else {}),
                    **({"reasoning_content": thinking} if thinking else {}),
                },
                "logprobs": {"content": logprobs, "refusal": None} if self._question.logprobs else None,
                "finish_reason": self._reason(number, answer.finish_reason),
            }
            for number, (text, thinking, calls, logprobs, answer) in enumerate(
                zip(self._texts, self._thinking, self._calls, self._logprobs, self._answers.answers, strict=True)
            )
        ]
        cost = {"usage": usage(self._answers.answers), "timings": timings(self._answers.answers)}
        return {**self._head, "object": "chat.completion", "choices": choices, **cost}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; an error comes as one, for the status is sent by then."""
        try:
            async for found in self._answers:
                if found is None:
                    yield PING
                    continue
                for choice in self._choices(*found):
                    yield self._event({"choices": [choice]})
        except VLMError as error:
            yield _data(refuse(error).as_openai())
        except Refusal as refusal:
            yield _data(refusal.as_openai())
        else:
            if self._question.usage:
                answers = self._answers.answers
                yield self._event({"choices": [], "usage": usage(answers), "timings": timings(answers)})
        yield DONE

    def _choices(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to a stream: the role first, the reason last."""
        deltas: list[tuple[dict[str, Any], str | None]] = []
        if number not in self._begun:
            self._begun.add(number)
            deltas.append(({"role": "assistant", "content": ""}, None))
        if chunk.thinking:
            deltas.append(({"reasoning_content": chunk.thinking}, None))
        text, calls = self._told(number, chunk)
        logprobs = self._logprobs_of(chunk)
        if text or logprobs:
            deltas.append(({"content": text}, None))
        deltas += [({"tool_calls": [call]}, None) for call in calls]
        if chunk.finish_reason is not None:
            deltas.append(({}, self._reason(number, chunk.finish_reason)))
        return [
            {
                "index": number,
                "delta": delta,
                "logprobs": {"content": logprobs, "refusal": None}
                if logprobs and delta.get("role") is None and delta
                else None,
                "finish_reason": reason,
            }
            for delta, reason in deltas
        ]

    def _told(self, number: int, chunk: Chunk) -> tuple[str, list[dict[str, Any]]]:
        """The text and the calls of tools that a chunk completes."""
        if not self._question.tools:
            return chunk.text, []
        text, found = self._filters[number].add(chunk.text)
        if chunk.finish_reason is not None:
            rest, last = self._filters[number].finish()
            text, found = text + rest, found + last
        calls = [
            {
                "index": len(self._calls[number]) + place,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for place, call in enumerate(found)
        ]
        self._calls[number] += calls
        return text, calls

    def _reason(self, number: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._calls[number] else reason

    def _event(self, content: dict[str, Any]) -> bytes:
        none = {"usage": None} if self._question.usage else {}
        return _data({**self._head, "object": "chat.completion.chunk", **none, **content})

    def _logprobs_of(self, chunk: Chunk) -> list[dict[str, Any]]:
        """A token's log-probability, in a list; nothing where it is not wanted, or the token only ends the answer."""
        processor: Processor = self._answers.engine.processor
        if not self._question.logprobs or chunk.token in processor.eos_token_ids:
            return []
        text = processor.tokenizer.decode([chunk.token], skip_special_tokens=False)
        return [{"token": text, "logprob": chunk.logprob, "bytes": [*text.encode()], "top_logprobs": []}]


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != "index"}


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Tokens of a request and its answers; the prompt counts once."""
    stats = [answer.stats or Stats() for answer in answers]
    prompt, generated = stats[0].prompt_tokens, sum(each.generated_tokens for each in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens, "image_tokens": stats[0].image_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(each.thinking_tokens for each in stats)},
    }


def timings(answers: list[Answer]) -> dict[str, Any]:
    """Seconds of the first answer, which OpenAI's form does not have: clients leave it out."""
    stats = answers[0].stats or Stats()
    rate = (stats.generated_tokens - 1) / stats.decode_s if stats.decode_s else None
    return {
        "image_s": stats.image_s, "prefill_s": stats.prefill_s, "first_token_s": stats.first_token_s,
        "decode_s": stats.decode_s, "tokens_per_second": rate, "context": stats.context_limit,
    }  # fmt: skip


def _data(content: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
    )
