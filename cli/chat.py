"""`mlx-vlm-mini chat`: a conversation in the terminal."""

import contextlib
import io
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_vlm_mini import bundled

from .options import loading_options, model_argument, sampling_options
from .status import Status

if TYPE_CHECKING:
    from mlx_vlm_mini import Chat

HELP = """\
/image PATH   show an image with your next message (a URL works too; may be repeated)
/clear        forget the conversation
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C ends an answer"""


@click.command("chat")
@model_argument
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="Shown with the first message. May be repeated.",
)
@click.option("--system", help="System message.")
@sampling_options
@loading_options
def command(
    model: str,
    images: tuple[str, ...],
    system: str | None,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Talk with MODEL about images, in turns.

    MODEL is a checkpoint folder or a name on the Hugging Face Hub; without it, a small demonstration model answers that
    comes with the program.

    \b
    Example:
      mlx-vlm-mini chat llava-hf/llava-1.5-7b-hf -i photo.jpg
    """
    from mlx_vlm_mini import Chat, load
    from mlx_vlm_mini.image import open_image

    opened = [open_image(image) for image in images]
    with Status() as status:
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
    if bundled.is_bundled(model):
        click.echo(bundled.NOTICE, err=True)
    chat = Chat(vlm, processor, system=system, **options)
    _converse(chat, [processor.prepare(image) for image in opened])


def _converse(chat: "Chat", waiting: list[Any]) -> None:
    """Read lines until the end; `waiting` are images for the next message."""
    from mlx_vlm_mini.errors import VLMError

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a prompt, not with a crash
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
        click.echo("Type a message, or /help.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D leaves", err=True)
            continue
        try:
            if line == "/quit":
                return
            if line == "/help":
                click.echo(HELP, err=True)
            elif line == "/clear":
                chat.clear()
                waiting.clear()
                click.echo("The conversation is forgotten.", err=True)
            elif line == "/image" or line.startswith("/image "):
                _add_image(chat, waiting, line.removeprefix("/image").strip())
            elif line.startswith("/"):
                click.echo(f"unknown command {line.split()[0]}; /help lists them", err=True)
            elif line:
                _answer(chat, waiting, line)
        except VLMError as error:
            click.echo(f"Error: {error}", err=True)


def _add_image(chat: "Chat", waiting: list[Any], path: str) -> None:
    if not path:
        click.echo("/image needs a path or a URL", err=True)
        return
    with contextlib.suppress(ValueError, IndexError):  # a path may stand in quotes, as shells write it
        path = shlex.split(path)[0] if path[0] in "'\"" else path.replace("\\ ", " ")
    waiting.append(chat.processor.prepare(path))
    number = len(waiting)
    click.echo(f"{number} image{'s' if number > 1 else ''} will be shown with your next message.", err=True)


def _answer(chat: "Chat", waiting: list[Any], line: str) -> None:
    with Status() as status:
        status.show("reading the prompt")
        try:
            for chunk in chat.send([*waiting, line], progress=status.prefill):
                status.clear()
                click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            status.clear()
            click.echo(" [stopped]", nl=False, err=True)
    waiting.clear()
    click.echo()
