"""`mlx-vlm-mini serve` as a process: what it says, how it ends, and what it refuses to begin."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PLAIN
from click.testing import CliRunner

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx

from mlx_vlm_mini.cli.main import main

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")


@contextmanager
def serving(*words: str) -> Iterator[tuple[Any, str]]:
    """The program, and where it listens."""
    with subprocess.Popen([PROGRAM, "serve", *words, "--port", "0"], stderr=subprocess.PIPE, text=True) as program:
        try:
            for line in program.stderr:
                if found := re.search(r"http://\S+", line):
                    yield program, found[0]
                    break
        finally:
            if program.poll() is None:
                program.kill()


def begin(url: str) -> socket.socket:
    """An answer that has begun, of a thousand tokens."""
    client = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), 20)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "max_tokens": 1000,
            "temperature": 50,
            "seed": 1,
        }
    )
    client.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    )
    assert client.recv(20).startswith(b"HTTP/1.1 200")
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(1 << 16):
        data += part
    return data


def test_sigterm_waits_for_answers_and_ends():
    with serving(str(PLAIN)) as (program, url):
        client = begin(url)
        program.send_signal(signal.SIGTERM)
        said = program.stderr.readline() + program.stderr.readline()
        assert "ending: answers that are being given are waited for" in said
        assert b"data: [DONE]\n\n" in read_all(client)
        assert program.wait(20) == 0
        with pytest.raises(OSError):
            begin(url)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_does_not_wait(number, code):
    with serving(str(PLAIN)) as (program, url):
        client = begin(url)
        program.send_signal(number)
        time.sleep(0.3)
        program.send_signal(number)
        assert program.wait(20) == code
        read_all(client)


def test_what_it_refuses_to_begin(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_VLM_MINI_API_KEY", raising=False)
    for words, message in (
        (["--host", "0.0.0.0"], "give a key with --api-key"),
        (["--api-key", ""], "the key is empty"),
        ([str(tmp_path)], "config.json"),
        (["--models-dir", str(tmp_path)], "there is no model to serve"),
        (["--origin", "mac"], "mac is no origin"),
    ):
        done = CliRunner().invoke(main, ["serve", "--port", "0", *words])
        assert done.exit_code == 1 and message in done.stderr and done.stdout == "", done.stderr
    assert CliRunner().invoke(main, ["serve", "--port", "70000"]).exit_code == 2


def test_a_key_of_the_environment_counts(monkeypatch):
    monkeypatch.setenv("MLX_VLM_MINI_API_KEY", " ")
    assert "the key is empty" in CliRunner().invoke(main, ["serve", "--port", "0"]).stderr


def test_without_the_extra_a_line_says_how_to_install_it():
    code = "import sys; sys.modules['uvicorn'] = None; from mlx_vlm_mini.cli.main import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'mlx-vlm-mini[serve]'" in done.stderr


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(main, ["serve", "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 1 and "choose another --port" in done.stderr


def test_ctrl_c_while_nobody_asks():
    with serving("demo") as (program, _):
        threading.Timer(0.1, program.send_signal, [signal.SIGINT]).start()
        assert program.wait(20) == 130
