"""`mlx-vlm-mini generate`: one prompt, one answer; or many, for scripts."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .drawing import check_drawing, check_not_given, draw_answer, drawing_options, find_mask_decoder
from .forms import form_options
from .interrupt import Interrupts
from .line import read_pictures
from .look import Look
from .main import INTERRUPTED
from .options import (
    batch_options,
    check_videos,
    complete_files,
    loading_options,
    model_argument,
    page_options,
    sampling_options,
    video_options,
)
from .part import Part
from .questions import ask, find_questions, list_pictures, spread
from .status import Status, cost_of
from .writing import Answer

if TYPE_CHECKING:
    from PIL import Image

    from mlx_vlm_mini.generation.answering import Chunk


@click.command("generate")
@model_argument
@click.option("-p", "--prompt", help="What to ask; - reads it from stdin.")
@click.option(
    "--prompt-file", metavar="FILE", help="Many prompts: one a line, or JSONL of messages; - reads them from stdin."
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="Path, URL, PDF (report.pdf[2-5]), or - for stdin; may be repeated. Of a folder or a quoted pattern each "
    "picture gets the prompt.",
    shell_complete=complete_files,
)
@page_options
@video_options
@click.option("--system", help="System message.")
@sampling_options
@form_options
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@click.option(
    "--output",
    metavar="FILE.jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append a line of JSON an answer; what the file holds already is not asked again.",
)
@batch_options
@drawing_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    images: tuple[str, ...],
    pages: dict[str, int],
    videos: list[dict[str, Any]],
    system: str | None,
    as_json: bool,
    output: Path | None,
    batch: dict[str, Any],
    draw: Path | None,
    mask_decoder: str | None,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Ask MODEL once and print its answer, or many times and print a line of JSON for each.

    MODEL is a checkpoint folder or a name on the Hugging Face Hub.

    \b
    Example:
      mlx-vlm-mini generate llava-hf/llava-1.5-7b-hf -p "What is this?" -i photo.jpg
      mlx-vlm-mini generate google/paligemma2-3b-mix-448 -p "detect cat" -i photo.jpg --draw boxes.png
      mlx-vlm-mini generate llava-hf/llava-1.5-7b-hf -p "What is this?" -i photos/ --output answers.jsonl
      mlx-vlm-mini generate Qwen/Qwen2.5-VL-3B-Instruct -p "What happens?" --video clip.mp4 --fps 1
      mlx-vlm-mini generate Qwen/Qwen2.5-VL-3B-Instruct -p "Is it day or night?" -i photo.jpg --choices day,night --json
    """
    from mlx_vlm_mini.errors import PromptError
    from mlx_vlm_mini.images.names import local_path

    from .batch import answer_many

    images_from: str | None = batch.pop("images_from")
    _check_usage(prompt, prompt_file, images, images_from, batch["part"], output)
    images = tuple(str(local_path(image)) if image[:7].lower() == "file://" else image for image in images)
    check_drawing(draw, mask_decoder, images)
    if prompt == "-":
        piped = sys.stdin.buffer.read().decode(errors="surrogateescape")
        prompt = piped.removeprefix("\ufeff").rstrip("\r\n")  # as `$(...)` of a shell does
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty: say what the model should answer")
    many = prompt is None or output is not None
    if "choices" in options and (many or as_json):
        options["probabilities"] = True
    if images_from is None:
        pictures = spread(images, by_page=many, most_pages=pages.get("most_pages"))
    else:
        pictures = list_pictures(images_from, most_pages=pages.get("most_pages"))
    if prompt is None or pictures is not None or output is not None:
        if draw is not None or videos or "-" in images:
            raise click.UsageError("--draw, --video, and an image on stdin, go with one answer on stdout")
        questions = find_questions(prompt, prompt_file, images, pictures, system, pages)
        try:
            answer_many(model, questions, output, **batch, loading=loading, options=options)
        except KeyboardInterrupt:
            if output is not None:
                click.echo(f"\nstopped: the same command goes on with {output}", err=True)
            ctx.exit(INTERRUPTED)
        return
    # Opened first: a wrong path should not cost the time that loading takes.
    names, opened = _open(images, pages, draw, mask_decoder)
    check_videos(videos)
    said = _Asked(model, prompt, names, opened, videos, system, draw, mask_decoder)
    if _answer_one(said, as_json, loading, options):
        ctx.exit(INTERRUPTED)


@dataclass(frozen=True)
class _Asked:
    """One prompt, its images opened; `names`: what these are called."""

    model: str
    prompt: str
    names: Sequence[str]
    images: Sequence["Image.Image"]
    videos: list[dict[str, Any]]
    system: str | None
    draw: Path | None
    mask_decoder: str | None


def _answer_one(asked: _Asked, as_json: bool, loading: dict[str, Any], options: dict[str, Any]) -> bool:
    """Print one answer; whether Ctrl-C ended it."""
    from mlx_vlm_mini import load, stream_generate

    from .batch import as_object

    decode_masks = None if asked.draw is None else find_mask_decoder(asked.mask_decoder, asked.model)
    with Status() as status:
        begin = time.perf_counter()
        status.show(f"loading {asked.model}")
        vlm, processor = load(asked.model, **loading)
        load_s = time.perf_counter() - begin
        status.show("reading the prompt")
        chunks: list[Chunk] = []
        interrupted = False
        answer = Answer(colour=Look.of_terminal().colour)
        messages = ask(asked.prompt, asked.images, asked.system).messages
        messages[-1]["content"] = [*asked.videos, *messages[-1]["content"]]
        try:
            with Interrupts() as interrupts:

                def progress(done: int, total: int) -> None:
                    status.prefill(done, total)
                    interrupts.check()

                for chunk in stream_generate(vlm, processor, messages, progress=progress, **options):
                    status.clear()
                    chunks.append(chunk)
                    if not as_json:
                        answer.add(chunk)
                    interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
    if not as_json:
        click.echo()
    drawn = {}
    if asked.draw is not None and not interrupted:
        answered = [chunk.token for chunk in chunks[chunks[-1].stats.thinking_tokens :]]
        text = processor.tokenizer.decode(answered, skip_special_tokens=False)
        size = asked.images[0].height, asked.images[0].width
        scale = processor.answer_scale(size, options["image_tokens"])
        drawn["detections"] = draw_answer(text, asked.images[0], asked.draw, decode_masks, scale)
    if as_json:
        said = as_object(chunks, {"load_s": load_s}, interrupted)
        named = {"images": asked.names} | ({"videos": [part["video"] for part in asked.videos]} if asked.videos else {})
        click.echo(json.dumps(named | said | drawn, ensure_ascii=False))
    elif chunks and sys.stderr.isatty():
        Look.of_terminal().note(cost_of(chunks[-1].stats))
    return interrupted


def _check_usage(
    prompt: str | None,
    prompt_file: str | None,
    images: Sequence[str],
    images_from: str | None,
    part: Part | None,
    output: Path | None,
) -> None:
    """Raises UsageError where options do not go together."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give --prompt, or --prompt-file for many" if prompt is None else "one prompt or many?")
    if [prompt, prompt_file, images_from, *images].count("-") > 1:
        raise click.UsageError("stdin can give one thing: the prompt, an image, or a list of them")
    if images and images_from is not None:
        raise click.UsageError("give --image or --images-from, not both")
    if part is not None and output is None:
        raise click.UsageError("--part goes with --output: the parts' files lie beside it")


def _open(
    images: Sequence[str], pages: dict[str, int], draw: Path | None, mask_decoder: str | None
) -> tuple[Sequence[str], list["Image.Image"]]:
    """The images of one prompt, and their names: those that were given, or those of pages."""
    from mlx_vlm_mini.images.source import open_image, read_stdin

    sources = [read_stdin() if image == "-" else image for image in images]
    for source in sources:
        if isinstance(source, bytes):
            check_not_given(draw, source)
    read = read_pictures(sources, pages)
    if draw is not None:
        check_drawing(draw, mask_decoder, [picture.name for picture in read])
    names = images if len(read) == len(images) else [picture.name for picture in read]
    return names, [open_image(picture) for picture in read]
