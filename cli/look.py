"""How a conversation looks: what the terminal can show and the user wants to see."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from .thumbnail import COLUMNS, Kind, draw_thumbnail, find_kind
from .writing import Answer, MarkdownAnswer, neutralize

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Look:
    """
    Attributes:
        plain: nothing but lines of text, each written once.
        colour: text may have colours.
        thumbnails: how pictures show.
        markdown: answers are rendered.
        costs: a line after each answer says what it cost.
    """

    plain: bool = False
    colour: bool = False
    thumbnails: Kind = "none"
    markdown: bool = False
    costs: bool = False

    @classmethod
    def of_terminal(cls, *, plain: bool = False, thumbnails: str = "none", markdown: bool = False) -> "Look":
        """As the options say, and no more than stdout, stderr and NO_COLOR allow."""
        if markdown and find_spec("rich") is None:
            raise click.UsageError("--markdown needs another package: pip install rich")
        terminal = sys.stdout.isatty() and sys.stderr.isatty() and not plain
        kind = find_kind(os.environ) if thumbnails == "auto" else thumbnails
        return cls(
            plain=plain,
            colour=terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
            thumbnails=kind if terminal else "none",  # type: ignore[arg-type]  # one of KINDS
            markdown=markdown and not plain,
            costs=sys.stderr.isatty(),
        )

    def answer(self) -> Answer:
        """What writes the next answer."""
        return (MarkdownAnswer if self.markdown else Answer)(colour=self.colour)

    def note(self, text: str) -> None:
        """A line on stderr that is not the conversation's own."""
        text = neutralize(text) if sys.stderr.isatty() else text
        click.echo(click.style(text, dim=True) if self.colour else text, err=True)

    def complain(self, error: Exception) -> None:
        """What went wrong, as one line."""
        text = " ".join(str(error).split())
        click.echo(f"Error: {neutralize(text) if sys.stderr.isatty() else text}", err=True)

    def show(self, image: "Image.Image", name: str) -> None:
        """An attached picture, small."""
        columns = min(COLUMNS, shutil.get_terminal_size().columns)
        click.echo(draw_thumbnail(image, self.thumbnails, os.environ, columns), nl=False, err=True)
        self.note(f"{name}, {image.width}x{image.height}")
