"""The real program in a pseudo-terminal: typing, completion, dragged paths, streaming, Ctrl-C, Ctrl-D, another size."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import PHOTO, PLAIN, edit_json

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")


class Terminal:
    """The program with a terminal of its own."""

    def __init__(self, *arguments: object, folder: Path, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(24, 100)
        own = {"TERM": "xterm", "HOME": str(folder), "XDG_STATE_HOME": str(folder), "PROMPT_TOOLKIT_NO_CPR": "1"}
        inherited = {key: os.environ[key] for key in os.environ.keys() - {"NO_COLOR", "COLORTERM", "TERM_PROGRAM"}}
        self.process = subprocess.Popen(
            [PROGRAM, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            cwd=folder, env={**inherited, **own, **environment}, preexec_fn=lambda: _take_terminal(0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def prompt(self) -> str:
        """Everything that came up to the next prompt."""
        return self.read_until(r"\x1b\[\?2004h.*?>")

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
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start the program in a folder with a picture in it."""
    opened: list[Terminal] = []
    shutil.copy(PHOTO, tmp_path / "photo.jpg")

    def started(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, folder=tmp_path, **environment))
        return opened[-1]

    yield started
    for each in opened:
        each.close()


def piped(tmp_path: Path, typed: str, *arguments: object) -> str:
    """What the program answers on stdout to lines on stdin."""
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)], input=typed, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout


def test_a_conversation_in_a_terminal(start, tmp_path):
    chat = start("chat", PLAIN, "-i", "photo.jpg", "--max-tokens", 5)
    chat.read_until(r"Type a message, or /help\.")
    chat.prompt()
    chat.type("What is it?\r")
    first = chat.read_until(r"5 tokens, .* tokens/s, first after .* s, 0 % cached, context \d+.* MB")
    (answer,) = piped(tmp_path, "What is it?\n", "chat", PLAIN, "-i", "photo.jpg", "--max-tokens", 5).splitlines()
    assert answer in first
    chat.prompt()
    chat.type("one\x1b\r")  # Alt-Enter
    chat.read_until("one")
    chat.type("two\\\r")
    chat.read_until("two")
    chat.type("\x1b[200~three\nfour\n\x1b[201~")  # pasted
    chat.read_until("four")
    chat.type("\r")
    chat.read_until(r"\d\d % cached")
    chat.prompt()
    chat.type("\x1b[A")  # up: the lines were one message
    chat.read_until("one(.|\n)*two(.|\n)*three(.|\n)*four")
    chat.type("\x03")
    chat.read_until("/quit or Ctrl-D leaves")
    chat.prompt()
    chat.type("\x04")  # Ctrl-D
    assert chat.process.wait(timeout=20) == 0
    history = tmp_path / "mlx-vlm-mini" / "history"
    assert "What is it?" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_tab_completes_and_a_dragged_picture_is_seen(start, tmp_path):
    picture = tmp_path / "my photo.jpg"
    shutil.copy(PHOTO, picture)
    chat = start("chat", PLAIN, "--max-tokens", 5, COLORTERM="truecolor")
    chat.prompt()
    chat.type("/he\t")
    chat.read_until("lp")  # the editor writes what is new
    chat.type("\r")
    chat.read_until(r"/quit +leave")
    chat.prompt()
    chat.type("What is @ph\t")
    chat.read_until(r"oto\.jpg")
    chat.type(" now?\r")
    shown = chat.read_until(r"▀.*\r\n.*photo\.jpg, \d+x\d+")
    assert "\x1b[38;2;" in shown
    chat.read_until(r"0 % cached")
    chat.prompt()
    chat.type(f"What is {str(picture).replace(' ', chr(92) + ' ')} here?\r")
    chat.read_until(r"my photo\.jpg, \d+x\d+")
    chat.read_until(r"\d % cached")
    chat.prompt()
    chat.type(f"{picture.as_uri()} /no/such/thing\r")
    chat.read_until(r"my photo\.jpg, \d+x\d+")
    chat.read_until(r"\d % cached")
    chat.prompt()
    chat.type("/stats\r")
    chat.read_until(r"images +3")
    chat.type("/quit\r")
    assert chat.process.wait(timeout=20) == 0


@pytest.fixture
def endless(copy_of: Callable[..., Path]) -> Path:
    """A model whose answers do not end by themselves: no token of its own is an end token."""
    folder = copy_of()
    edit_json(folder / "generation_config.json", eos_token_id=99_999)
    return folder


def test_ctrl_c_ends_the_answer_and_the_next_turn_works(start, endless):
    chat = start("chat", endless, "--max-tokens", 20000, "--context", 30000, "-t", 1, "--seed", 1, NO_COLOR="1")
    chat.prompt()
    chat.type("Tell me a long story\r")
    chat.read_until(r"reading the prompt\r\x1b\[2K.*\w{2,}")
    chat.type("\x03")
    chat.read_until(r"\[stopped\]")
    assert "\x1b[2m" not in chat.prompt()
    chat.type("/set max_tokens 3\r")
    chat.read_until("max_tokens 3")
    chat.prompt()
    chat.type("And then?\r")
    chat.read_until(r"3 tokens, .* [1-9]\d % cached")
    chat.prompt()
    chat.type("/quit\r")
    assert chat.process.wait(timeout=20) == 0


def test_another_size_of_the_terminal(start):
    chat = start("chat", PLAIN, "--max-tokens", 400, "-t", 1, "--seed", 1)
    chat.prompt()
    chat.type("a b " * 20)
    chat.read_until(r"(?:b[^b]*){20}")
    chat.resize(24, 30)  # at the prompt: it is drawn again, in more lines
    chat.read_until(r"> (a b ){6}a b *\x1b\[0m\r\r\n")
    chat.type("\r")
    chat.read_until(r"reading the prompt\r\x1b\[2K.*\w{2,}")
    chat.resize(10, 60)  # in the middle of an answer
    chat.read_until(r"\d+ tokens, ")
    chat.prompt()
    assert not termios.tcgetattr(chat.master)[3] & termios.ICANON
    chat.process.terminate()  # the terminal is left as it was
    assert chat.process.wait(timeout=20) == 128 + signal.SIGTERM
    assert termios.tcgetattr(chat.master)[3] & termios.ICANON
    chat.read_until(r"\x1b\[\?2004l")


def test_plain(start):
    chat = start("chat", PLAIN, "--plain", "--max-tokens", 5, COLORTERM="truecolor")
    chat.read_until("> ")
    chat.type("What is @photo.jpg?\n")
    seen = chat.read_until(r"\d tokens, .* MB\r\n> ")
    assert "\x1b" not in seen and "▀" not in seen
    chat.type("\x04")
    assert chat.process.wait(timeout=20) == 0
    assert "\x1b" not in chat.seen


def test_piped_input(tmp_path):
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    options = ("--max-tokens", 5)
    there = piped(tmp_path, "@photo.jpg What is it?\n", "chat", PLAIN, *options)
    before = piped(tmp_path, "/image photo.jpg\nWhat is it?\n/quit\n", "chat", PLAIN, *options)
    assert there == before == piped(tmp_path, "", "generate", PLAIN, "-p", "What is it?", "-i", "photo.jpg", *options)
    joined = piped(tmp_path, "What\\\nis it?", "chat", PLAIN, *options)
    assert joined == piped(tmp_path, "", "generate", PLAIN, "-p", "What\nis it?", *options)


def test_ctrl_c_ends_generate_and_keeps_what_was_said(start, endless):
    generate = start("generate", endless, "-p", "Tell me a long story", "--max-tokens", 100000, "-t", 1, "--seed", 1)
    generate.read_until(r"reading the prompt\r\x1b\[2K.*\w{2,}")
    generate.type("\x03")
    generate.read_until(r"first after \d")
    assert generate.process.wait(timeout=20) == 128 + signal.SIGINT
    assert "Traceback" not in generate.seen


def test_progress_shows_while_loading(start):
    generate = start("generate", PLAIN, "-p", "Hi", "--max-tokens", 2)
    generate.read_until(re.escape(f"loading {PLAIN}"))
    generate.read_until(r"first after \d")
    assert generate.process.wait(timeout=20) == 0


def test_many_answers_show_a_bar_and_ctrl_c_leaves_whole_lines(start, tmp_path):
    (tmp_path / "prompts.txt").write_text("Tell me a long story\n" * 400)
    command = ("generate", PLAIN, "--prompt-file", "prompts.txt", "--output", "out.jsonl", "--max-tokens", 60)
    generate = start(*command)
    generate.read_until(r"answering \[.*[2-9]/400")
    generate.type("\x03")
    generate.read_until(r"stopped: the same command goes on with out\.jsonl")
    assert generate.process.wait(timeout=20) == 128 + signal.SIGINT
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    assert 2 <= len(lines) < 400 and all(line.endswith("}\n") for line in lines)
