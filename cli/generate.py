"""`mlx-vlm-mini generate`: one prompt, one answer."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .drawing import check_drawing, draw_answer, drawing_options, find_mask_decoder
from .main import INTERRUPTED
from .options import loading_options, model_argument, sampling_options
from .status import Status

if TYPE_CHECKING:
    from mlx_vlm_mini.stream import Chunk


@click.command("generate")
@model_argument
@click.option("-p", "--prompt", required=True, help="What to ask; - reads it from stdin.")
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="Path, URL, or - for stdin. May be repeated.",
)
@click.option("--system", help="System message.")
@sampling_options
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@drawing_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    prompt: str,
    images: tuple[str, ...],
    system: str | None,
    as_json: bool,
    draw: Path | None,
    mask_decoder: str | None,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Ask MODEL once and print its answer.

    MODEL is a checkpoint folder or a name on the Hugging Face Hub.

    \b
    Example:
      mlx-vlm-mini generate llava-hf/llava-1.5-7b-hf -p "What is this?" -i photo.jpg
      mlx-vlm-mini generate google/paligemma2-3b-mix-448 -p "detect cat" -i photo.jpg --draw boxes.png
    """
    from mlx_vlm_mini.errors import PromptError
    from mlx_vlm_mini.image import open_image

    check_drawing(draw, mask_decoder, images)
    if prompt == "-" and "-" in images:
        raise click.UsageError("stdin can give the prompt or an image, not both")
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    if not prompt.strip():
        raise PromptError("the prompt is empty: say what the model should answer")
    # Opened first: a wrong path should not cost the time that loading takes.
    opened = [open_image(sys.stdin.buffer.read() if image == "-" else image) for image in images]

    from mlx_vlm_mini import load, stream_generate

    decode_masks = None if draw is None else find_mask_decoder(mask_decoder, model)
    parts = [*({"type": "image", "image": image} for image in opened), {"type": "text", "text": prompt}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})

    with Status() as status:
        begin = time.perf_counter()
        status.show(f"loading {model}")
        vlm, processor = load(model, **loading)
        load_s = time.perf_counter() - begin
        status.show("reading the prompt")
        chunks: list[Chunk] = []
        interrupted = False
        try:
            for chunk in stream_generate(vlm, processor, messages, progress=status.prefill, **options):
                status.clear()
                chunks.append(chunk)
                if not as_json:
                    click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            interrupted = True
    if not as_json:
        click.echo()
    drawn = {}
    if draw is not None and not interrupted:
        text = "".join(chunk.text for chunk in chunks)
        drawn["detections"] = draw_answer(text, opened[0], draw, decode_masks)
    if as_json:
        click.echo(json.dumps(_as_object(chunks, load_s, interrupted) | drawn, ensure_ascii=False))
    else:
        _note(chunks)
    if interrupted:
        ctx.exit(INTERRUPTED)


def _as_object(chunks: list["Chunk"], load_s: float, interrupted: bool) -> dict[str, Any]:
    stats = asdict(chunks[-1].stats) if chunks else {}
    counts = ("prompt_tokens", "image_tokens", "cached_tokens")
    times = ("image_s", "prefill_s", "first_token_s", "decode_s")
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [chunk.token for chunk in chunks],
        "logprobs": [chunk.logprob for chunk in chunks],
        "finish_reason": "interrupted" if interrupted else chunks[-1].finish_reason,
        **{key: stats.get(key, 0) for key in counts},
        "timings": {"load_s": load_s, **{key: stats.get(key, 0.0) for key in times}},
        "peak_memory_bytes": stats.get("peak_memory_bytes", 0),
    }


def _note(chunks: list["Chunk"]) -> None:
    """A line about the answer, for a person at a terminal."""
    if not chunks or not sys.stderr.isatty():
        return
    stats = chunks[-1].stats
    rate = (stats.generated_tokens - 1) / stats.decode_s if stats.decode_s else 0.0
    click.secho(
        f"{stats.prompt_tokens} prompt tokens ({stats.image_tokens} of images), first token after "
        f"{stats.first_token_s:.2f} s, {rate:.1f} tokens/s, {stats.peak_memory_bytes / 1e9:.1f} GB at most",
        dim=True,
        err=True,
    )
