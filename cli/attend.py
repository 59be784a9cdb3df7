"""`mlx-vlm-mini attend`: where a model looked for each token of its answer."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import click

from .line import read_pictures
from .look import Look
from .options import complete_files, loading_options, model_argument, page_options, sampling_options
from .questions import ask
from .status import Status
from .thumbnail import KINDS
from .writing import Answer, free_name, neutralize

if TYPE_CHECKING:
    from PIL import Image

    from mlx_vlm_mini import Chat
    from mlx_vlm_mini.generation.answering import Chunk
    from mlx_vlm_mini.grounding.attended import AnswerAttention

SUFFIXES = (".png", ".html", ".npz")


@click.command("attend")
@model_argument
@click.option("-p", "--prompt", help="What to ask.")
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="Path, URL, PDF (report.pdf[2-5]), or - for stdin. May be repeated.",
    shell_complete=complete_files,
)
@page_options
@click.option(
    "--drawn",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="In place of a question: a picture that imagine drew, to see where its attention to each word came from.",
)
@click.option("--answer", help="The answer to look at.  [default: the model's own]")
@click.option("--system", help="System message.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A contact sheet (.png), a page to point at (.html), or arrays (.npz). May be repeated.",
)
@click.option(
    "--tokens",
    "folder",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="A heat map of each token, in the picture's size.",
)
@click.option(
    "--reduce",
    type=click.Choice(["mean", "rollout", "none"]),
    default="mean",
    show_default=True,
    help="What becomes of layers and heads; none keeps them all, for .npz.",
)
@click.option("--layers", metavar="LIST", help="Layers to look at: 0,4-7,-1.  [default: all]")
@click.option("--heads", metavar="LIST", help="Heads to look at.  [default: all]")
@click.option(
    "--thumbnails", type=click.Choice(KINDS), default="auto", show_default=True, help="How the preview shows."
)
@sampling_options
@loading_options
def command(
    model: str,
    prompt: str | None,
    images: tuple[str, ...],
    pages: dict[str, int],
    drawn: Path | None,
    answer: str | None,
    system: str | None,
    outputs: tuple[Path, ...],
    folder: Path | None,
    layers: str | None,
    heads: str | None,
    thumbnails: str,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Ask MODEL about images and show where it looked for each token of its answer; or, with --drawn, show for each
    word of a drawn picture's prompt from where in the picture attention went to it.

    The answer goes to stdout. In a terminal a preview follows: the mean over all tokens, and of each token how much of
    its attention the images have.

    \b
    Example:
      mlx-vlm-mini attend llava-hf/llava-1.5-7b-hf -i photo.jpg -p "What colour is the car?" -o heat.png -o heat.html
    """
    from mlx_vlm_mini.errors import PromptError
    from mlx_vlm_mini.images.source import open_image, read_stdin

    if drawn is not None and (prompt is not None or images or answer is not None or system is not None):
        raise click.UsageError(
            "--drawn has its prompt and picture in the file: leave out --prompt, --image and the like"
        )
    if drawn is None and prompt is None:
        raise click.UsageError("attend needs a question: give --prompt")
    if drawn is None and not images:
        raise click.UsageError("attend needs an image to look at: give --image")
    if images.count("-") > 1:
        raise click.UsageError("stdin can give one image")
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty: say what the model should answer")
    look = Look.of_terminal(thumbnails=thumbnails)
    if not outputs and folder is None and not sys.stderr.isatty():
        raise click.UsageError("nothing would be shown outside of a terminal: give --output or --tokens")
    for file in outputs:
        check_output(file)
    if folder is not None:
        check_folder(folder)
    options |= {"layers": parse_numbers("--layers", layers), "heads": parse_numbers("--heads", heads)}
    if drawn is not None:
        found = attend_file(drawn, model, loading, outputs, folder, options)
        if sys.stderr.isatty():
            preview(found, look)
        return
    # Opened first: a wrong path should not cost the time that loading takes.
    pictures = read_pictures([read_stdin() if image == "-" else image for image in images], pages)
    for picture in pictures:
        open_image(picture)

    from mlx_vlm_mini import attend, load
    from mlx_vlm_mini.grounding.attended import name_numbers

    with Status() as status:
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        status.show("reading the prompt")
        writer = Answer(colour=look.colour)

        def listen(chunk: "Chunk") -> None:
            status.clear()
            writer.add(chunk)

        messages = ask(prompt or "", pictures, system).messages
        found = attend(vlm, processor, messages, answer=answer, listen=listen, progress=status.prefill, **options)
        if answer is not None:
            status.clear()
            writer.write("".join(found.texts))
        click.echo()
        if "linear_attention" in vlm.config.decoder.layer_types:
            those = (
                f"layer {found.layers[0]} attends"
                if len(found.layers) == 1
                else (f"layers {name_numbers(found.layers)} attend")
            )
            look.note(f"{those} to the images; layers that keep a state have no attention to show")
        write_all(found, outputs, folder, status)
    if sys.stderr.isatty():
        preview(found, look)


def attend_file(
    drawn: Path,
    model: str,
    loading: dict[str, Any],
    outputs: Sequence[Path],
    folder: Path | None,
    options: dict[str, Any],
) -> "AnswerAttention":
    """What `--drawn` asks for."""
    from mlx_vlm_mini.drawing.drawn import read_drawn
    from mlx_vlm_mini.errors import ImageError

    try:
        picture = read_drawn(drawn.read_bytes(), drawn.name)
    except OSError as error:
        raise ImageError(f"cannot read {drawn}: {error.strerror or error}") from None

    from mlx_vlm_mini import attend_drawn, load

    with Status() as status:
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        status.show("looking at where the attention went")
        found = attend_drawn(vlm, processor, picture, **{name: options[name] for name in ("reduce", "layers", "heads")})
        write_all(found, outputs, folder, status)
    return found


def write_all(found: "AnswerAttention", outputs: Sequence[Path], folder: Path | None, status: Status) -> None:
    """Write what `--output` and `--tokens` ask for."""
    for file in outputs:
        status.show(f"writing {file}")
        write_output(found, file)
    if folder is not None:
        write_tokens(found, folder, status)


def parse_numbers(name: str, text: str | None) -> list[int] | None:
    """`0,4-7,-1` as numbers."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or (match[2] and not 0 <= int(match[1]) <= int(match[2])):
            raise click.UsageError(f"{name} takes numbers and ranges, as in 0,4-7,-1, not {part.strip()!r}")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def check_output(file: Path) -> None:
    """Refuse what cannot be written, or would replace what `attend` did not write."""
    from mlx_vlm_mini.errors import PromptError

    if file.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"--output takes {', '.join(SUFFIXES)}: {file} ends in none of them")
    if not file.parent.is_dir():
        raise click.UsageError(f"--output: there is no folder {file.parent}")
    if (file.exists() or file.is_symlink()) and not is_ours(file):
        raise PromptError(f"{file} was not written by attend, so it stays: give another name, or remove it")


def check_folder(folder: Path) -> None:
    """The same for a folder of heat maps: what stands where they would must be ours."""
    for file in sorted(folder.glob("token-*.png")) if folder.is_dir() else []:
        check_output(file)
    if not folder.parent.is_dir():
        raise click.UsageError(f"--tokens: there is no folder {folder.parent}")


def is_ours(file: Path) -> bool:
    """Whether `attend` wrote a file."""
    import numpy as np
    from PIL import Image

    from mlx_vlm_mini.grounding.attended import MADE_BY

    try:
        if file.suffix.lower() == ".png":
            with Image.open(file) as image:
                return image.format == "PNG" and image.info.get("Software") == MADE_BY
        if file.suffix.lower() == ".html":
            with file.open("rb") as page:
                return f'<meta name="generator" content="{MADE_BY}">'.encode() in page.read(2000)
        with np.load(file) as arrays:
            return "made_by" in arrays and str(arrays["made_by"]) == MADE_BY
    except (OSError, ValueError, SyntaxError, EOFError, BadZipFile):  # what cannot be read is none of ours
        return False


def write_output(found: "AnswerAttention", file: Path) -> None:
    """Write a contact sheet, a page or arrays, as the name says; the file appears whole or not at all.

    Raises:
        PromptError: it cannot be written.
    """
    from mlx_vlm_mini import attention_page, draw_attention
    from mlx_vlm_mini.files import write_whole

    ways: dict[str, Callable[[Path], object]] = {
        ".png": lambda place: save_png(draw_attention(found), place),
        ".html": lambda place: place.write_text(attention_page(found), encoding="utf-8"),
        ".npz": found.save,
    }
    write_whole(file, ways[file.suffix.lower()])


def save_png(image: "Image.Image", file: Path) -> None:
    """A PNG that says that it is ours."""
    from PIL.PngImagePlugin import PngInfo

    from mlx_vlm_mini.grounding.attended import MADE_BY

    info = PngInfo()
    info.add_text("Software", MADE_BY)
    image.save(file, "PNG", pnginfo=info)


def write_tokens(found: "AnswerAttention", folder: Path, status: Status) -> None:
    """A heat map a token, `token-000.png` and on; those of a longer answer before are removed."""
    from mlx_vlm_mini import draw_attention
    from mlx_vlm_mini.files import write_whole

    written = []
    folder.mkdir(exist_ok=True)
    for token in range(len(found.tokens)):
        status.show(f"writing heat map {token + 1} of {len(found.tokens)}")
        file = folder / f"token-{token:03d}.png"
        write_whole(file, lambda place, token=token: save_png(draw_attention(found, token), place))  # type: ignore[misc]
        written.append(file)
    for file in set(folder.glob("token-*.png")) - set(written):
        file.unlink()


def preview(found: "AnswerAttention", look: Look) -> None:
    """The mean over the answer as a thumbnail, and of each token what part of its attention the images have."""
    from mlx_vlm_mini.grounding.heat import draw_attention, mean_token

    if look.thumbnails != "none":
        look.show(draw_attention(mean_token(found), 0), f"mean of all {'words' if found.drawn else 'tokens'}")
    labels = [neutralize(" ".join(found.label(token).split())) for token in range(len(found.tokens))]
    width = min(24, max(map(len, labels)))
    for label, share in zip(labels, found.shares.tolist(), strict=True):
        look.note(f"{label[:width]:<{width}} {share:4.0%} {'█' * round(30 * share)}")


def attend_last(chat: "Chat", typed: str) -> Path:
    """Write where the model looked for a conversation's last answer, and give the file's path.

    Args:
        typed: the file's name; empty for a contact sheet, the next free `attention.png` here.

    Raises:
        PromptError: there is no answer, no image, or the file is not ours to replace.
    """
    from mlx_vlm_mini import attend
    from mlx_vlm_mini.errors import PromptError

    if not chat.messages or chat.messages[-1]["role"] != "assistant":
        raise PromptError("there is no answer yet to look at")
    file = Path(typed) if typed else free_name("attention")
    try:
        check_output(file)
    except click.UsageError as error:
        raise PromptError(error.message.replace("--output", "/attend")) from None
    *before, said = chat.messages
    answer: str | Sequence[int] = chat.last_tokens or said["content"][0]["text"]
    found = attend(chat.model, chat.processor, before, answer=answer, features=chat.features, think=chat.last_think)
    write_output(found, file)
    return Path(os.path.abspath(file))  # noqa: PTH100 - links stay
