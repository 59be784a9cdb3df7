"""Where typed messages come from: an editor with history and completion at a terminal, plain lines elsewhere."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import click

from .completion import Offer

PROMPT = "> "


class Reader(Protocol):
    """`read` gives one message, which may have several lines. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""

    interactive: bool
    edits: bool

    def read(self, begin: str = "") -> str: ...


def open_reader(offers: Callable[[str], Sequence[Offer]], *, plain: bool) -> Reader:
    """The reader for this terminal, or for none.

    Args:
        offers: completions of what stands before the cursor.
        plain: no editor, even where there is a terminal.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a prompt, not with a crash
    if plain or not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") in (None, "", "dumb"):
        return Lines()
    from .keyboard import Keyboard

    return Keyboard(offers, history_file(), PROMPT)


class Lines:
    """Lines of stdin; a backslash at the end of one joins the next."""

    edits = False

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._begun = False

    def read(self, begin: str = "") -> str:
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("  "))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.interactive:
            click.echo(prompt, nl=False, err=not sys.stdout.isatty())
        line = sys.stdin.readline()
        if not line:
            if self.interactive:
                click.echo(err=True)
            raise EOFError
        line, self._begun = line if self._begun else line.removeprefix("\ufeff"), True  # a file's first mark is no text
        return line.rstrip("\r\n")


def history_file() -> Path | None:
    """The user's history, made readable to nobody else; None where it cannot be written."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"  # noqa: PTH117
        file = folder / "mlx-vlm-mini" / "history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        file.chmod(0o600)
    except (OSError, RuntimeError, ValueError):
        return None
    return file
