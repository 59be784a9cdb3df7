"""`mlx-vlm-mini chat`: a conversation in the terminal."""

from functools import partial
from typing import Any

import click

from mlx_vlm_mini.checkpoints import bundled

from .commands import COMMANDS, Session, find_settings
from .completion import complete
from .forms import form_options
from .line import read_pictures
from .look import Look
from .options import (
    check_videos,
    complete_files,
    loading_options,
    model_argument,
    page_options,
    sampling_options,
    video_options,
)
from .reading import open_reader
from .status import Status
from .thumbnail import KINDS


@click.command("chat")
@model_argument
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="Shown with the first message: path, URL, PDF (report.pdf[2-5]). May be repeated.",
    shell_complete=complete_files,
)
@page_options
@video_options
@click.option("--system", help="System message.")
@click.option(
    "--thumbnails",
    type=click.Choice(KINDS),
    default="auto",
    show_default=True,
    help="How attached pictures show in the terminal.",
)
@click.option("--markdown", is_flag=True, help="Render answers as Markdown, block by block.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens that a conversation may have.  [default: the model's]",
)
@click.option(
    "--on-full",
    type=click.Choice(["stop", "drop"]),
    default="stop",
    show_default=True,
    help="When the context is full: refuse the message, or forget the oldest turns.",
)
@click.option("--kv-bits", type=click.Choice(["2", "4", "8"]), help="Quantize the cache; each turn is then read anew.")
@click.option(
    "--rotate", type=click.IntRange(1), metavar="N", help="Keep a cache of N tokens; the model sees no others."
)
@click.option("--plain", is_flag=True, help="Nothing but lines of text: no editor, colours or pictures.")
@sampling_options
@form_options
@loading_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    images: tuple[str, ...],
    pages: dict[str, int],
    videos: list[dict[str, Any]],
    system: str | None,
    thumbnails: str,
    markdown: bool,
    plain: bool,
    context: int | None,
    on_full: Any,
    kv_bits: str | None,
    rotate: int | None,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Talk with MODEL about images, in turns.

    MODEL is a checkpoint folder or a name on the Hugging Face Hub; without it, a small demonstration model answers that
    comes with the program. @photo.jpg in a message, or a file dragged into the terminal, shows a picture at that place;
    /help lists what else can be typed.

    \b
    Example:
      mlx-vlm-mini chat llava-hf/llava-1.5-7b-hf -i photo.jpg
    """
    from mlx_vlm_mini.errors import VLMError
    from mlx_vlm_mini.images.source import open_image

    look = Look.of_terminal(plain=plain, thumbnails=thumbnails, markdown=markdown)
    pictures = read_pictures(images, pages)
    for picture in pictures:  # a wrong path should not cost the time that loading takes
        open_image(picture)
    check_videos(videos)

    from mlx_vlm_mini import Chat, load

    def begin(name: str, **loading: Any) -> Chat:
        return Chat(
            *load(name, **loading), system=system, context=context, on_full=on_full,
            kv_bits=None if kv_bits is None else int(kv_bits), rotate=rotate, **options,
        )  # fmt: skip

    with Status(plain=plain) as status:
        status.show(f"loading {model}")
        chat = begin(model, **loading)
    if bundled.is_bundled(model):
        click.echo(bundled.NOTICE, err=True)
    # What speaks of one checkpoint does not go on to another.
    again = partial(begin, dtype=loading["dtype"])
    session = Session(chat, model, pages=pages, look=look, settings=find_settings(ctx.command), begin=again)
    reader = open_reader(
        lambda line: complete(line, {name: does for name, (_, does) in COMMANDS.items()}, session.settings()),
        plain=plain,
    )
    session.ask = reader.read if reader.edits else None
    session.waiting += [session.show_picture(each, each.name) for each in pictures]
    with Status(plain=plain) as status:
        status.show("reading the videos")
        session.waiting += [session.prepare_video(part) for part in videos]
    if reader.interactive:
        click.echo("Type a message, or /help.", err=True)
    failed = False
    while True:
        try:
            line = reader.read()
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D leaves", err=True)
            continue
        try:
            if not session.take(line):
                break
        except (KeyboardInterrupt, EOFError):  # in the editor of /edit, or while another model was loaded
            click.echo(err=True)
        except BrokenPipeError:
            raise
        except (VLMError, OSError) as error:
            look.complain(error)
            failed = True
    if failed and not reader.interactive and all(message["role"] != "assistant" for message in session.chat.messages):
        ctx.exit(1)
