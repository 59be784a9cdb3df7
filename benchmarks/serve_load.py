"""A server under load and with faults: every answer is the library's, memory stays, first tokens come soon.

    python benchmarks/serve_load.py                               100 requests at a time for a minute, then the faults
    python benchmarks/serve_load.py --seconds 10 --at-once 20     less of it
    python benchmarks/serve_load.py --model FOLDER --max-tokens 20

It starts `mlx-vlm-mini serve` on loopback. Eight kinds of request, drawn at random: a text whole and as a stream, a
picture whole and as a stream, two pictures, the second turn of a conversation, a form, Ollama's stream, sampled with a
seed. Nothing but 200, 429 and 503 is allowed; 429 is tried again after what `Retry-After` says. Then: clients that
leave in the middle, clients that do not read, bodies of a gigabyte, and SIGTERM among answers.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from mlx_vlm_mini import load, stream_generate

ROOT = Path(__file__).parents[1]
PICTURES = [ROOT / "examples" / name for name in ("scene.png", "other.png")]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def image(file: Path) -> dict[str, Any]:
    data = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def user(text: str, *files: Path) -> dict[str, Any]:
    return {"role": "user", "content": [*map(image, files), {"type": "text", "text": text}]}


def kinds(most: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Names, paths and bodies of the requests."""
    chat, talk = "/v1/chat/completions", [user("What do you see?", PICTURES[0]), {"role": "assistant", "content": "A"}]
    raw = base64.b64encode(PICTURES[0].read_bytes()).decode()
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    whole = {
        "text": {"messages": [user("Hello")]},
        "picture": {"messages": [user("What do you see?", PICTURES[0])]},
        "picture, stream": {"messages": [user("What do you see?", PICTURES[1])], "stream": True},
        "two pictures": {"messages": [user("Which picture has more objects?", *PICTURES)]},
        "second turn": {"messages": [*talk, user("Where is the star?")], "stream": True},
        "form": {"messages": [user("What?", PICTURES[0])], "response_format": form},
        "seed": {"messages": [user("What do you see?", PICTURES[0])], "temperature": 1.0, "seed": 5},
    }
    found = {name: (chat, {**body, "max_tokens": most}) for name, body in whole.items()}
    said = [{"role": "user", "content": "What colour is the circle?", "images": [raw]}]
    found["ollama"] = ("/api/chat", {"messages": said, "options": {"num_predict": most}})
    return found


def expected(path: str, body: dict[str, Any], loaded: Any) -> str:
    """What the library answers to the same."""
    options = {key: body[key] for key in ("temperature", "seed") if key in body}
    if "response_format" in body:
        options["schema"] = SCHEMA
    most = body["options"]["num_predict"] if path == "/api/chat" else body["max_tokens"]
    messages = [
        {**message, "images": [f"data:;base64,{each}" for each in message["images"]]}
        if "images" in message
        else message
        for message in body["messages"]
    ]
    return "".join(chunk.text for chunk in stream_generate(*loaded, messages, max_tokens=most, **options))


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], waits: Counter[int]) -> tuple[str, float]:
    """The text of an answer, and seconds to its first piece."""
    while True:
        begin, first, text = time.monotonic(), 0.0, ""
        async with client.stream("POST", path, json=body) as response:
            if response.status_code in (429, 503):
                waits[response.status_code] += 1
                pause = float(response.headers["retry-after"])
            elif response.status_code != 200:
                raise AssertionError(f"{response.status_code}: {(await response.aread())[:300]!r}")
            elif "application/json" in response.headers["content-type"]:
                found = json.loads(await response.aread())
                return found["choices"][0]["message"]["content"], time.monotonic() - begin
            else:
                async for line in response.aiter_lines():
                    line = line.removeprefix("data: ")
                    if not line.startswith("{"):
                        continue
                    found = json.loads(line)
                    if "error" in found:
                        raise AssertionError(line)
                    part = found["message"]["content"] if "message" in found else ""
                    for choice in found.get("choices", []):
                        part = choice["delta"].get("content", "")
                    if part and not text:
                        first = time.monotonic() - begin
                    text += part
                return text, first
        await asyncio.sleep(pause * random.random() + 0.1)


def memory_of(process: int) -> int:
    """Bytes of a process that are in memory (of Linux)."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def load_it(url: str, process: int, chosen: argparse.Namespace, answers: dict[str, str]) -> None:
    asked, waits, firsts, memory, wrong = kinds(chosen.max_tokens), Counter(), [], [], []  # type: ignore[var-annotated]
    until, done = time.monotonic() + chosen.seconds, Counter()  # type: ignore[var-annotated]
    limits = httpx.Limits(max_connections=None)

    async def worker(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:
            while time.monotonic() < until:
                name = rng.choice([*asked])
                text, first = await ask(client, *asked[name], waits)
                done[name] += 1
                firsts.append(first)
                if text != answers[name]:
                    wrong.append(f"{name}: {text[:100]!r}, the library says {answers[name][:100]!r}")

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(memory_of(process) / 1e6)
            await asyncio.sleep(chosen.seconds / 20)

    await asyncio.gather(watch(), *(worker(number) for number in range(chosen.at_once)))
    half = len(memory) // 2
    print(f"answers: {sum(done.values())} in {chosen.seconds:g} s, {dict(done)}; told to come later: {dict(waits)}")
    print(f"first piece: median {statistics.median(firsts):.2f} s, most {max(firsts):.2f} s")
    print(f"memory: {memory[half]:.0f} MB at half time, {memory[-1]:.0f} MB at the end, most {max(memory):.0f} MB")
    for each in wrong[:5]:
        print("WRONG", each)
    if wrong or memory[-1] > 1.15 * memory[half] + 20:
        sys.exit("failed: answers differ" if wrong else "failed: memory grows")


def connect(url: str, path: str, body: bytes, length: int | None = None) -> socket.socket:
    place = httpx.URL(url)
    client = socket.create_connection((place.host, place.port), 30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


def busy(url: str) -> int:
    return httpx.get(f"{url}/health", timeout=30, trust_env=False).json()["busy"]


def wait_idle(url: str, seconds: float) -> float:
    begin = time.monotonic()
    while busy(url):
        if time.monotonic() - begin > seconds:
            sys.exit(f"failed: {busy(url)} requests are still busy after {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - begin


def fault_it(url: str, process: int, answers: dict[str, str]) -> None:
    long = json.dumps({**kinds(500)["picture, stream"][1], "temperature": 1.5, "seed": 1, "n": 2}).encode()
    path = "/v1/chat/completions"
    for _ in range(40):
        connect(url, path, long).close()
    halves = [connect(url, path, long[:2000], len(long)) for _ in range(20)]
    for client in halves:
        client.close()
    print(f"60 clients that left: idle after {wait_idle(url, 30):.1f} s")
    slow = [connect(url, path, long) for _ in range(8)]
    text, _ = asyncio.run(ask_once(url, "picture"))
    assert text == answers["picture"]
    for client in slow:
        client.close()
    print(f"8 clients that do not read: others were answered; idle after {wait_idle(url, 30):.1f} s")
    before = memory_of(process) / 1e6
    for length in (2**30, None):
        begin, status = time.monotonic(), b""
        try:
            client = connect(url, path, b"", 2**30) if length else connect_chunked(url, path)
            for _ in range(1024):
                client.sendall(b" " * 2**20 if length else b"100000\r\n" + b" " * 2**20 + b"\r\n")
        except OSError:
            pass  # it is refused, and closed
        try:
            status = client.recv(12)
        except OSError:
            status = b"closed"
        client.close()
        print(f"a body of 1 GB: {status!r} after {time.monotonic() - begin:.1f} s")
    print(f"memory: {before:.0f} MB before, {memory_of(process) / 1e6:.0f} MB after")
    wait_idle(url, 10)


def connect_chunked(url: str, path: str) -> socket.socket:
    place = httpx.URL(url)
    client = socket.create_connection((place.host, place.port), 30)
    client.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    return client


async def ask_once(url: str, name: str) -> tuple[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        return await ask(client, *kinds(40)[name], Counter())


def end_it(url: str, program: subprocess.Popen[str]) -> None:
    """SIGTERM while answers are given: they end whole, and the process does."""
    body = json.dumps(kinds(40)["picture, stream"][1]).encode()
    clients = [connect(url, "/v1/chat/completions", body) for _ in range(8)]
    while busy(url) < 8:
        if any(client.recv(1, socket.MSG_PEEK) for client in clients if busy(url) < 8):
            break
    program.send_signal(signal.SIGTERM)
    whole = 0
    for client in clients:
        data = b""
        while part := client.recv(65536):
            data += part
        whole += data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or b"data: [DONE]" in data
    print(f"SIGTERM among answers: {whole} of {len(clients)} came whole; the process ended with {program.wait(60)}")
    if whole < len(clients) or program.returncode:
        sys.exit("failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=40)
    chosen = parser.parse_args()
    loaded = load(chosen.model, access="served")
    asked = kinds(chosen.max_tokens)
    answers = {name: expected(*each, loaded) for name, each in asked.items()}
    words = [Path(sys.executable).with_name("mlx-vlm-mini"), "serve", chosen.model, "--port", "0"]
    with (
        open(os.devnull, "w") as quiet,  # noqa: PTH123
        subprocess.Popen([*words], stderr=subprocess.PIPE, stdout=quiet, text=True) as program,
    ):
        try:
            assert program.stderr is not None
            url = next(found[0] for line in program.stderr if (found := re.search(r"http://\S+", line)))
            drain = subprocess.Popen(["cat"], stdin=program.stderr, stdout=subprocess.DEVNULL)  # its log
            asyncio.run(load_it(url, program.pid, chosen, answers))
            fault_it(url, program.pid, {name: expected(*each, loaded) for name, each in kinds(40).items()})
            end_it(url, program)
            drain.wait(10)
        finally:
            program.kill()


if __name__ == "__main__":
    main()
