"""`mlx-vlm-mini imagine`: pictures from words."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .look import Look
from .options import DTYPES, model_argument
from .status import Status
from .thumbnail import KINDS
from .writing import free_name

if TYPE_CHECKING:
    from mlx_vlm_mini.drawing.drawn import Drawn
    from mlx_vlm_mini.model import VLM
    from mlx_vlm_mini.processor import Processor


@click.command("imagine")
@model_argument
@click.option("-p", "--prompt", required=True, help="What the picture should show.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture (.png); of several FILE-1.png and on.",
)
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Pictures.")
@click.option(
    "--guidance",
    type=float,
    default=5.0,
    show_default=True,
    help="How much the prompt counts: 1 draws by it alone, more goes beyond it, 0 ignores its words.",
)
@click.option(
    "-t",
    "--temperature",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="0 takes the likeliest image token, which gives dull pictures.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), help="Of the first picture; the others follow.  [default: a new one]"
)
@click.option("--thumbnails", type=click.Choice(KINDS), default="auto", show_default=True, help="How pictures show.")
@click.option("--dtype", type=DTYPES, help="Type to compute in.  [default: the checkpoint's; float32 on a CPU]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
def command(
    model: str, prompt: str, output: Path, count: int, thumbnails: str, dtype: Any, revision: str | None, **options: Any
) -> None:
    """Draw pictures with MODEL, which must be one that draws: Janus-Pro.

    The files' paths go to stdout. Each PNG's text says the prompt, the seed and the model, and has the image tokens, so
    that `attend --drawn FILE` can show what each word did. A file that imagine wrote is replaced, no other.

    \b
    Example:
      mlx-vlm-mini imagine deepseek-community/Janus-Pro-1B -p "A lighthouse in a storm, oil painting" -o out.png --count 4
    """
    from mlx_vlm_mini.errors import PromptError

    if not prompt.strip():
        raise PromptError("the prompt is empty: say what the picture should show")
    files = name_files(output, count)
    for file in files:
        check_file(file)
    look = Look.of_terminal(thumbnails=thumbnails)
    check_options(count=count, **options)
    check_model(model, revision)

    from mlx_vlm_mini import imagine, load

    with Status() as status:
        status.show(f"loading {model}")
        vlm, processor = load(model, revision=revision, dtype=dtype)
        status.show("reading the prompt")
        drawn = imagine(vlm, processor, prompt, count=count, progress=progress_on(status), **options)
        write_pictures(drawn, files, model)
    for picture, file in zip(drawn, files, strict=True):
        show(picture, look, file.name)
        click.echo(str(file))


def check_options(**options: Any) -> None:
    """Raise PromptError where one is out of range, before a model is loaded."""
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()

    from mlx_vlm_mini.drawing.imagine import DrawOptions

    DrawOptions(**options)


def check_model(model: str, revision: str | None = None) -> None:
    """Refuse a model that cannot draw, by its config.json and the names of its tensors alone.

    Raises:
        CheckpointError: it cannot.
    """
    from mlx_vlm_mini.checkpoints.assembly import open_model
    from mlx_vlm_mini.checkpoints.load import plan
    from mlx_vlm_mini.drawing.imagine import refuse_config

    refuse_config(plan(open_model(model, revision=revision, weights=False)).config, model)


def progress_on(status: Status) -> Callable[[int, int], None]:
    """Says how many image tokens there are, and about how many seconds are left."""
    begin: list[float] = []

    def progress(done: int, total: int) -> None:
        begin.append(time.monotonic())
        elapsed = begin[-1] - begin[0]
        left = f", {elapsed / (done - 1) * (total - done):.0f} s left" if done > 1 else ""
        status.show(f"drawing: {done} of {total} tokens{left}")

    return progress


def name_files(output: Path, count: int) -> list[Path]:
    """The pictures' files."""
    if output.suffix.lower() != ".png":
        raise click.UsageError(f"--output takes .png: {output} does not end in it")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def check_file(file: Path) -> None:
    """Refuse what cannot be written, or would replace what `imagine` did not write.

    Raises:
        PromptError: another program's file is there.
    """
    from mlx_vlm_mini.drawing.drawn import read_drawn
    from mlx_vlm_mini.errors import ImageError, PromptError

    if not file.parent.is_dir():
        raise click.UsageError(f"--output: there is no folder {file.parent}")
    if not file.exists() and not file.is_symlink():
        return
    try:
        read_drawn(file.read_bytes(), file.name)
    except (OSError, ImageError):
        raise PromptError(f"{file} was not written by imagine, so it stays: give another name, or remove it") from None


def write_pictures(drawn: "list[Drawn]", files: list[Path], model: str) -> None:
    """Write pictures, each file whole or not at all."""
    from mlx_vlm_mini.files import write_whole

    for picture, file in zip(drawn, files, strict=True):
        data = picture.to_png(model)
        write_whole(file, lambda place, data=data: place.write_bytes(data))  # type: ignore[misc]


def show(picture: "Drawn", look: Look, name: str) -> None:
    """Print a preview and the cost of the picture, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return
    if look.thumbnails != "none":
        look.show(picture.image, name)
    stats = picture.stats
    speed = stats.generated_tokens * stats.together / stats.decode_s if stats.decode_s else 0
    look.note(
        f"seed {picture.seed}: {stats.generated_tokens} tokens, {speed:.1f} tokens/s, {stats.decode_s:.1f} s and "
        f"{stats.pixels_s:.1f} s for the pixels"
    )


def draw_here(model: "VLM", processor: "Processor", prompt: str, name: str, *, plain: bool) -> Path:
    """Draw one picture into the next free `imagined.png` of this folder, and give its path.

    Args:
        name: the model's.
        plain: no progress.

    Raises:
        CheckpointError, PromptError: the model cannot draw, or the prompt is empty.
    """
    from mlx_vlm_mini import imagine
    from mlx_vlm_mini.drawing.imagine import check_drawing

    check_drawing(model, processor, name)
    with Status(plain=plain) as status:
        drawn = imagine(model, processor, prompt, progress=progress_on(status))
    file = free_name("imagined")
    write_pictures(drawn, [file], name)
    return file
