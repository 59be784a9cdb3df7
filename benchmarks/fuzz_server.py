"""Throws broken bodies at the server's application: each gets an answer, or a refusal in JSON; none makes it fail.

    nice python benchmarks/fuzz_server.py                     100,000 bodies
    python benchmarks/fuzz_server.py --count 300 --seed 2     others
    python benchmarks/fuzz_server.py --seed 1 --one 1234      repeats one, and prints it

Bodies of all routes are changed by structure (keys, types, sizes, odd values) or byte by byte, sent in pieces, under
their own route or another. A tiny model answers those that are whole. A failure is a status that is none of those that
docs/server.md names, a body that is not JSON in the interface's form, a fault in the log, or more than 10 s.
"""
# ruff: noqa: E501 - tables

import argparse
import asyncio
import base64
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_checkpoints import mutate, mutate_bytes

from mlx_vlm_mini import load
from mlx_vlm_mini.generation.engine import Engine
from mlx_vlm_mini.images.source import Access
from mlx_vlm_mini.serve.app import make_app
from mlx_vlm_mini.serve.limits import Limits
from mlx_vlm_mini.serve.models import Models
from mlx_vlm_mini.serve.server import about, make_server

MOST_SECONDS = 10.0
STATUSES = {200, 400, 404, 405, 413}
GOLDENS = Path(__file__).parents[1] / "tests" / "golden"
MODEL = str(GOLDENS / "llava-clip-llama")
PICTURE = base64.b64encode((GOLDENS / "shapes.png").read_bytes()).decode()
URL = f"data:image/png;base64,{PICTURE}"
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
SAID: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        ],
    },
    {"role": "assistant", "content": "A house.", "reasoning_content": "I see."},
    {"role": "user", "content": "And now?", "name": "me"},
]
BODIES: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"model": "tiny", "messages": SAID, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": SAID[:1] + SAID[3:], "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2, "logprobs": True}),
    ("/v1/chat/completions", {
        "model": "tiny", "messages": SAID[3:], "max_completion_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2,
        "stop": ["a", "b"], "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "user": "x", "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False}, "repetition_penalty": 1.1, "modalities": ["text"],
    }),
    ("/v1/chat/completions", {"messages": SAID[3:], "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "file", "file": {"filename": "a.pdf", "file_data": URL}}]}], "max_tokens": 2}),
    ("/v1/attention", {"model": "tiny", "messages": SAID[:3]}),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "What?", "images": [PICTURE]}], "stream": False, "options": {"num_predict": 2}}),
    ("/api/chat", {"model": "tiny:latest", "messages": SAID[3:], "format": SCHEMA, "options": {"num_predict": 2, "temperature": 0.3, "stop": "x"}, "think": False, "keep_alive": "5m"}),
    ("/api/generate", {"model": "tiny", "prompt": "Hi", "system": "Be brief.", "images": [PICTURE], "options": {"num_predict": 1, "seed": 3}}),
    ("/api/show", {"model": "tiny", "name": "tiny", "verbose": True}),
]  # fmt: skip


def make(number: int, seed: int) -> tuple[str, list[bytes]]:
    """A path, and a body in pieces."""
    rng = random.Random(f"{seed} {number}")
    path, body = rng.choice(BODIES)
    if rng.random() < 0.05:
        path = rng.choice(BODIES)[0]
    data = json.dumps(mutate(body, rng) if rng.random() < 0.8 else body).encode()
    if rng.random() < 0.3:
        data = mutate_bytes(data, rng)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3))))
    return path, [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


async def send(app: Any, path: str, pieces: list[bytes]) -> tuple[int, str, bytes]:
    """The status, the type and the body of a response."""
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})
    never, status, kind, body = asyncio.Event(), 0, "", b""

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await never.wait()

    async def sent(message: Any) -> None:
        nonlocal status, kind, body
        if message["type"] == "http.response.start":
            status = message["status"]
            kind = dict(message["headers"]).get(b"content-type", b"").decode()
        else:
            body += message.get("body", b"")

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, sent)
    return status, kind, body


def amiss(path: str, status: int, kind: str, body: bytes) -> str | None:
    """What is wrong with a response; None where nothing is."""
    if status not in STATUSES:
        return f"status {status}"
    try:
        if kind.startswith("text/event-stream"):
            lines = [line for line in body.decode().split("\n\n") if line]
            if lines[-1] != "data: [DONE]":
                return "the stream has no end"
            parsed = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]
        else:
            parsed = [json.loads(line) for line in body.decode().splitlines()]
    except (ValueError, IndexError) as error:
        return f"no JSON: {error}"
    if status != 200:
        error = parsed[0].get("error")
        if path.startswith("/api/"):
            return None if isinstance(error, str) else "the error is not in Ollama's form"
        whole = (
            isinstance(error, dict)
            and isinstance(error.get("message"), str)
            and {"type", "param", "code"} <= error.keys()
        )
        return None if whole else "the error is not in OpenAI's form"
    return None


async def run(numbers: range, seed: int, *, show: bool) -> list[str]:
    """The failures."""
    model, processor = load(MODEL, access=Access(pdfs=True))
    limits = Limits(body=2**20, depth=40, images=3, max_tokens=2, seconds=8)
    models = Models({"tiny": MODEL}, lambda _: Engine(model, processor, context=250))
    server, log = make_server(models, {"tiny": about(MODEL)}, limits, at_once=8), []
    app, statuses, failures, begin = make_app(server, log=log.append), Counter(), [], time.monotonic()

    async def one(number: int) -> None:
        path, pieces = make(number, seed)
        start = time.monotonic()
        status, kind, body = await send(app, path, pieces)
        took = time.monotonic() - start
        wrong = amiss(path, status, kind, body)
        wrong = wrong or (f"took {took:.1f} s" if took > MOST_SECONDS else None)
        statuses[status] += 1
        if wrong is not None:
            failures.append(f"{number}: {path}: {wrong}: {body[:200]!r}")
        if show:
            print(path, b"".join(pieces)[:3000], status, body[:2000], sep="\n")

    for start in range(numbers.start, numbers.stop, 8):
        await asyncio.gather(*(one(number) for number in range(start, min(start + 8, numbers.stop))))
        failures += [line for line in log if line.startswith("fault")]
        log.clear()
        if sys.stderr.isatty():
            print(f"\r{start + 8} {dict(statuses)}", end="", file=sys.stderr)
    server.desk.close()
    await models.close()
    seconds = time.monotonic() - begin
    print(
        f"{len(numbers)} bodies in {seconds:.0f} s, by status {dict(sorted(statuses.items()))}; failures: {len(failures)}"
    )
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--one", type=int, help="the number of one to repeat")
    chosen = parser.parse_args()
    numbers = range(chosen.count) if chosen.one is None else range(chosen.one, chosen.one + 1)
    failures = asyncio.run(run(numbers, chosen.seed, show=chosen.one is not None))
    for failure in failures[:50]:
        print(failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
