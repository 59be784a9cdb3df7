"""`mlx-vlm-mini generate`: one prompt, one answer; or many, for scripts."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .batch import Item, Output, answer_all, ask, ask_about, check_pictures, left_to_do, read_prompts, spread
from .drawing import check_drawing, check_not_given, draw_answer, drawing_options, find_mask_decoder
from .interrupt import Interrupts
from .line import read_pictures
from .look import Look
from .main import INTERRUPTED
from .options import (
    check_videos,
    complete_files,
    loading_options,
    model_argument,
    page_options,
    sampling_options,
    video_options,
)
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
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@click.option(
    "--output",
    metavar="FILE.jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append a line of JSON an answer; what the file holds already is not asked again.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Of many prompts, those that are answered together at most; fewer where memory does not allow it.",
)
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
    batch_size: int,
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
    """
    from mlx_vlm_mini.errors import PromptError
    from mlx_vlm_mini.images.names import local_path

    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give --prompt, or --prompt-file for many" if prompt is None else "one prompt or many?")
    if [prompt, prompt_file, *images].count("-") > 1:
        raise click.UsageError("stdin can give the prompt or an image, not both")
    images = tuple(str(local_path(image)) if image[:7].lower() == "file://" else image for image in images)
    check_drawing(draw, mask_decoder, images)
    if prompt == "-":
        piped = sys.stdin.buffer.read().decode(errors="surrogateescape")
        prompt = piped.removeprefix("\ufeff").rstrip("\r\n")  # as `$(...)` of a shell does
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty: say what the model should answer")
    many = prompt is None or output is not None
    pictures = spread(images, by_page=many, most_pages=pages.get("most_pages"))
    if prompt is None or pictures is not None or output is not None:
        if draw is not None or videos or "-" in images:
            raise click.UsageError("--draw, --video, and an image on stdin, go with one answer on stdout")
        about: Sequence[str | Sequence[str]] | None = (pictures or [images]) if images else None
        items = _questions(prompt, prompt_file, about, system, pages)
        _answer_many(ctx, model, items, output, loading, options, batch_size)
        return
    # Opened first: a wrong path should not cost the time that loading takes.
    names, opened = _open(images, pages, draw, mask_decoder)
    check_videos(videos)

    from mlx_vlm_mini import load, stream_generate

    decode_masks = None if draw is None else find_mask_decoder(mask_decoder, model)
    with Status() as status:
        begin = time.perf_counter()
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        load_s = time.perf_counter() - begin
        status.show("reading the prompt")
        chunks: list[Chunk] = []
        interrupted = False
        answer = Answer()
        messages = ask(prompt, opened, system).messages
        messages[-1]["content"] = [*videos, *messages[-1]["content"]]
        try:
            with Interrupts() as interrupts:

                def progress(done: int, total: int) -> None:
                    status.prefill(done, total)
                    interrupts.check()

                for chunk in stream_generate(vlm, processor, messages, progress=progress, **options):
                    status.clear()
                    chunks.append(chunk)
                    if not as_json:
                        answer.write(chunk.text)
                    interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
    if not as_json:
        click.echo()
    drawn = {}
    if draw is not None and not interrupted:
        text = processor.tokenizer.decode([chunk.token for chunk in chunks], skip_special_tokens=False)
        scale = processor.answer_scale((opened[0].height, opened[0].width))
        drawn["detections"] = draw_answer(text, opened[0], draw, decode_masks, scale)
    if as_json:
        said = _as_object(chunks, {"load_s": load_s}, interrupted)
        named = {"images": names} | ({"videos": [part["video"] for part in videos]} if videos else {})
        click.echo(json.dumps(named | said | drawn, ensure_ascii=False))
    elif chunks and sys.stderr.isatty():
        Look.of_terminal().note(cost_of(chunks[-1].stats))
    if interrupted:
        ctx.exit(INTERRUPTED)


def _questions(
    prompt: str | None,
    prompt_file: str | None,
    about: Sequence[str | Sequence[str]] | None,
    system: str | None,
    pages: Mapping[str, Any],
) -> list[Item]:
    """The one question, or those of a file, about each of some pictures where there are any."""
    if prompt is not None:
        items = [ask(prompt, [], system)]
    else:
        items = read_prompts(str(prompt_file), system, pages.get("most_pages"))
    items = items if about is None else ask_about(items, about, system)
    return [replace(item, dpi=pages["dpi"]) for item in items] if "dpi" in pages else items


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


def _answer_many(
    ctx: click.Context,
    model: str,
    items: Sequence[Item],
    path: Path | None,
    loading: dict[str, Any],
    options: dict[str, Any],
    batch_size: int,
) -> None:
    """Answer all items into a file or onto stdout, and end with exit code 1 where some could not be."""
    from mlx_vlm_mini.errors import PromptError

    with Output(path) as output, Status() as status:
        status.show("looking at what there is to do")
        todo = left_to_do(items, output, {"model": model, **loading, **options})
        status.clear()
        if path is not None and len(todo) < len(items):
            click.echo(f"{path} holds {len(items) - len(todo)} of {len(items)} answers already", err=True)
        if not todo:
            return

        from mlx_vlm_mini import Engine, load
        from mlx_vlm_mini.generation.features import Features
        from mlx_vlm_mini.text.messages import images_of

        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        status.clear()
        pixels = Features()

        def ask_engine(item: Item) -> Callable[[], dict[str, Any]]:
            messages = [
                message
                if isinstance(message["content"], str)
                else {**message, "content": [pixels.prepare_part(processor, part) for part in message["content"]]}
                for message in item.opened()
            ]
            check_pictures(item, [part["image"].origin.sha256 for part in images_of(messages)])
            request = engine.submit(messages)

            def wait() -> dict[str, Any]:
                chunks = []
                for chunk in request:
                    chunks.append(chunk)
                    interrupts.check()
                return _as_object(chunks, {}, False)

            return wait

        try:
            with Interrupts() as interrupts, Engine(vlm, processor, batch_size=batch_size, **options) as engine:
                failed = answer_all(todo, output, ask_engine, batch_size)
        except KeyboardInterrupt:
            if path is not None:
                click.echo(f"\nstopped: the same command goes on with {path}", err=True)
            ctx.exit(INTERRUPTED)
    if failed:
        raise PromptError(f"{failed} of {len(items)} could not be answered: see their lines of output")


def _as_object(chunks: list["Chunk"], more_timings: dict[str, float], interrupted: bool) -> dict[str, Any]:
    stats = asdict(chunks[-1].stats) if chunks else {}
    counts = ("prompt_tokens", "image_tokens", "cached_tokens")
    times = ("image_s", "prefill_s", "first_token_s", "decode_s")
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [chunk.token for chunk in chunks],
        "logprobs": [chunk.logprob for chunk in chunks],
        "finish_reason": "interrupted" if interrupted else chunks[-1].finish_reason,
        **{key: stats.get(key, 0) for key in counts},
        "timings": {**more_timings, **{key: stats.get(key, 0.0) for key in times}},
        "peak_memory_bytes": stats.get("peak_memory_bytes", 0),
    }
