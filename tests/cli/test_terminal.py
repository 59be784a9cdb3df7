"""The real program in a pseudo-terminal: streaming, Ctrl-C, Ctrl-D."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import PHOTO, PLAIN

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")


class Terminal:
    """The program with a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [PROGRAM, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"}, preexec_fn=lambda: _take_terminal(0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def read_until(self, pattern: str, timeout: float = 30) -> str:
        """Everything that came up to and with the pattern."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"waited for {pattern!r}, saw {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # Linux: the other side is closed
                    assert re.search(pattern, self.seen), f"ended before {pattern!r}: {self.seen!r}"
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


def test_chat_in_a_terminal(terminal):
    chat = Terminal("chat", PLAIN, "-i", PHOTO, "--max-tokens", 5)
    terminal.append(chat)
    chat.read_until(r"Type a message, or /help\.")
    chat.read_until("> ")
    chat.type("What is it?\n")
    chat.read_until(r"\n[^>]*\n> ")
    chat.type("/help\n")
    chat.read_until(r"/quit +leave.*\n> ")
    chat.type("\x04")  # Ctrl-D
    assert chat.process.wait(timeout=20) == 0


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal):
    chat = Terminal("chat", PLAIN, "--max-tokens", 400, "-t", 1, "--seed", 1)
    terminal.append(chat)
    chat.read_until("> ")
    chat.type("Tell me a long story\n")
    chat.read_until(r"reading the prompt\r\x1b\[2K.*\w{2,}")
    chat.type("\x03")  # Ctrl-C
    chat.read_until(r"\[stopped\]\r\n> ")
    chat.type("/quit\n")
    assert chat.process.wait(timeout=20) == 0


def test_ctrl_c_ends_generate_and_keeps_what_was_said(terminal):
    generate = Terminal("generate", PLAIN, "-p", "Tell me a long story", "--max-tokens", 100000, "-t", 1, "--seed", 1)
    terminal.append(generate)
    generate.read_until(r"reading the prompt\r\x1b\[2K.*\w{2,}")
    generate.type("\x03")
    assert generate.process.wait(timeout=20) == 128 + signal.SIGINT
    assert "Traceback" not in generate.seen


def test_progress_shows_while_loading(terminal):
    generate = Terminal("generate", PLAIN, "-p", "Hi", "--max-tokens", 2)
    terminal.append(generate)
    generate.read_until(re.escape(f"loading {PLAIN}"))
    generate.read_until(r"first token after \d")
    assert generate.process.wait(timeout=20) == 0
