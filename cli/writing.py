"""Answers on stdout as they come: raw, or rendered as Markdown on purpose. What a model says never steers the terminal."""

import io
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlx_vlm_mini.generation.answering import Chunk

# Control characters show as their symbols, so that an answer can neither move the cursor nor send sequences.
_VISIBLE: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD), ord("\r"): None}


def neutralize(text: str) -> str:
    """Text without control characters, line ends and tabs excepted."""
    return text.translate(_VISIBLE)


def echo(text: str) -> None:
    """A line on stdout that may hold what a file says."""
    click.echo(neutralize(text) if sys.stdout.isatty() else text)


class Answer:
    """Writes an answer piece by piece. Where stdout is no terminal, it is exactly what the model said.

    What it thought before stands on stderr, where that is a terminal, dim where that has colours.
    """

    waits = False

    def __init__(self, *, colour: bool = False) -> None:
        """`colour`: whether stderr has them."""
        self._terminal = sys.stdout.isatty()
        self._colour = colour
        self._thinks = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a locale without all characters ends no answer

    def add(self, chunk: "Chunk") -> None:
        """Write what a chunk has."""
        if chunk.thinking and sys.stderr.isatty():
            text = neutralize(chunk.thinking)
            click.echo(click.style(text, dim=True) if self._colour else text, err=True, nl=False)
            self._thinks = True
        if self._thinks and (chunk.text or chunk.finish_reason is not None):
            click.echo("\n" if chunk.text else "", err=True)  # an empty line before the answer
            self._thinks = False
        if chunk.text:
            self.write(chunk.text)
        if chunk.finish_reason == "length" and chunk.stats.thinking_tokens == chunk.stats.generated_tokens:
            click.echo("the model was still thinking when the answer had its most tokens (max tokens)", err=True)

    def write(self, text: str) -> None:
        """Write a piece of the answer."""
        sys.stdout.write(neutralize(text) if self._terminal else text)  # click.echo would strip sequences
        sys.stdout.flush()

    def __enter__(self) -> "Answer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class MarkdownAnswer(Answer):
    """Renders each block of Markdown when it is whole: at an empty line outside of fences, and at the end."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__(colour=colour)
        self._waiting = ""
        self._written = False

    def write(self, text: str) -> None:
        self._waiting += neutralize(text)
        while (cut := block_end(self._waiting)) is not None:
            block, self._waiting = self._waiting[:cut], self._waiting[cut:]
            self._render(block)

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """Whether there is text that does not show yet."""
        return bool(self._waiting.strip())

    def __exit__(self, *_: Any) -> None:
        if self._waiting.strip():
            self._render(self._waiting)

    def _render(self, block: str) -> None:
        from rich.console import Console
        from rich.markdown import Markdown

        if self._written:
            click.echo()
        self._written = True
        console = Console(file=sys.stdout, no_color=not self._colour, highlight=False)
        console.print(Markdown(block, hyperlinks=False))  # a link is an escape sequence with the model's text in it


def block_end(text: str) -> int | None:
    """Where the first block of Markdown ends: behind its empty line; None while it may go on."""
    place, fenced, begun = 0, False, False
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            return None
        place += len(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not line.strip() and begun and not fenced:
            return place
        begun = begun or bool(line.strip())
    return None


def free_name(stem: str) -> Path:
    """The first of `stem.png`, `stem-2.png` and on that is not in this folder."""
    number = 1
    while (file := Path(f"{stem}.png" if number == 1 else f"{stem}-{number}.png")).exists():
        number += 1
    return file
