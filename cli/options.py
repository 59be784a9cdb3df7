"""Options that several commands share."""

import functools
import re
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_vlm_mini.checkpoints import bundled

from .part import PartType

DTYPES = click.Choice(["float32", "float16", "bfloat16"])


ORIGINAL_OPTIONS = (  # of the original LLaVA's checkpoints, whose config.json names what lies elsewhere
    click.option("--conversation", metavar="NAME", help="Prompt of an original LLaVA.  [default: by the model's name]"),
    click.option(
        "--vision-tower", metavar="FOLDER", help="Vision tower of an original LLaVA.  [default: what it names]"
    ),
)


def original_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--vision-tower and --conversation."""
    for option in ORIGINAL_OPTIONS:
        function = option(function)
    return function


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: what stands here may be a file."""
    return [CompletionItem(incomplete, type="file")]


class MemoryType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """An amount of memory, as `mlx_vlm_mini.layers.memory.read_memory` reads it."""

    name = "AMOUNT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType`; it is read when the model is there."""
        if not re.fullmatch(r"(?i)\s*[\d.]+\s*(%|[kmgt]?i?b?)\s*", str(value)):
            self.fail(f"{value!r} is no amount of memory: give a size like 12GB, or a share like 0.5", param, ctx)
        return str(value)


def model_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("model", metavar="[MODEL]", default=bundled.NAME)(function)


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `load` takes, handed on as one dictionary `loading`."""

    @functools.wraps(function)
    def gathered(*arguments: Any, **options: Any) -> Any:
        limits = ("min_tiles", "max_tiles", "min_pixels", "max_pixels")
        names = ("revision", "dtype", *limits, "vision_tower", "conversation")
        return function(*arguments, loading={name: options.pop(name) for name in names}, **options)

    command: Callable[..., Any] = gathered
    for option in (
        *ORIGINAL_OPTIONS,
        click.option(
            "--max-tiles",
            type=click.IntRange(1),
            help="Tiles of an image at most, where a family cuts it (InternVL, SmolVLM, Gemma 3).",
        ),
        click.option(
            "--max-pixels",
            type=click.IntRange(1),
            help="Height times width of an image at most, where a family takes any size (Qwen2-VL).",
        ),
        click.option("--min-pixels", type=click.IntRange(1), help="Height times width of an image at least."),
        click.option("--min-tiles", type=click.IntRange(1), help="Tiles of an image at least."),
        click.option("--dtype", type=DTYPES, help="Type to compute in.  [default: the checkpoint's; float32 on a CPU]"),
        click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
    ):
        command = option(command)
    return command


def page_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--dpi and --max-pages, handed on as `pages`, keywords of `read_images`."""

    @functools.wraps(function)
    def gathered(*arguments: Any, **options: Any) -> Any:
        given = {"dpi": options.pop("dpi"), "most_pages": options.pop("max_pages")}
        return function(
            *arguments, pages={name: value for name, value in given.items() if value is not None}, **options
        )

    command: Callable[..., Any] = gathered
    for option in (
        click.option("--max-pages", type=click.IntRange(1), help="Pages of a PDF at most.  [default: 20]"),
        click.option("--dpi", type=click.IntRange(1, 1200), help="Pixels an inch of a PDF's pages.  [default: 144]"),
    ):
        command = option(command)
    return command


def batch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--images-from, --part, --batch-size and --memory, of many answers, handed on as `batch`."""

    @functools.wraps(function)
    def gathered(*arguments: Any, **options: Any) -> Any:
        names = ("images_from", "part", "batch_size", "memory")
        return function(*arguments, batch={name: options.pop(name) for name in names}, **options)

    command: Callable[..., Any] = gathered
    for option in (
        click.option(
            "--memory",
            type=MemoryType(),
            help="For weights and answers together: a size (12GB) or a share of the device's memory (0.5).  [default: half "
            "of what the weights leave free]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=16,
            show_default=True,
            help="Of many prompts, those that are answered together at most; fewer where memory does not allow it.",
        ),
        click.option(
            "--part",
            type=PartType(),
            help="With --output: the K-th of N parts of the work, in a file beside FILE, for N machines; `auto` takes both "
            "numbers from MLX's, MPI's or Slurm's environment. Without it, the files of all parts are taken in.",
        ),
        click.option(
            "--images-from",
            metavar="FILE",
            help="A list of pictures, a path or URL a line, each of which gets the prompt; - reads it from stdin.",
            shell_complete=complete_files,
        ),
    ):
        command = option(command)
    return command


def video_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--video, --fps and --max-frames, handed on as parts of a message, `videos`."""

    @functools.wraps(function)
    def gathered(*arguments: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("fps", "max_frames")}
        videos = options.pop("videos")
        if not videos and any(value is not None for value in given.values()):
            raise click.UsageError("--fps and --max-frames go with --video")
        parts = [{"type": "video", "video": video, **given} for video in videos]
        return function(*arguments, videos=parts, **options)

    command: Callable[..., Any] = gathered
    for option in (
        click.option("--max-frames", type=click.IntRange(1), help="Frames of a video at most."),
        click.option(
            "--fps",
            type=click.FloatRange(0, 1000, min_open=True),
            help="Frames a second to look at; of a folder, how many of its pictures are a second.  [default: 2]",
        ),
        click.option(
            "--video",
            "videos",
            multiple=True,
            metavar="VIDEO",
            help="Video file (needs the extra `video`), or a folder of its frames; may be repeated (Qwen2-VL to 3-VL).",
            shell_complete=complete_files,
        ),
    ):
        command = option(command)
    return command


def check_videos(videos: list[dict[str, Any]]) -> None:
    """Raise an error where one cannot be opened, before a model is loaded."""
    if not videos:
        return

    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()

    from mlx_vlm_mini.images.video import open_video
    from mlx_vlm_mini.text.messages import to_messages

    for part in to_messages([*videos, "?"])[0]["content"][:-1]:
        open_video(part["image"])


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--max-tokens, --temperature and the other fields of `Options` that a terminal can give."""
    for option in reversed(
        [
            click.option(
                "--max-tokens",
                type=click.IntRange(1),
                default=256,
                show_default=True,
                help="Length of an answer at most.",
            ),
            click.option(
                "-t",
                "--temperature",
                type=click.FloatRange(0),
                default=0.0,
                show_default=True,
                help="0 takes the likeliest token.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1),
                default=0.0,
                help="Sample among the likeliest tokens of this total probability.",
            ),
            click.option(
                "--min-p",
                type=click.FloatRange(0, 1),
                default=0.0,
                help="Leave out tokens below this share of the likeliest one.",
            ),
            click.option("--top-k", type=click.IntRange(0), default=0, help="Sample among this many tokens."),
            click.option(
                "--repetition-penalty",
                type=click.FloatRange(0, min_open=True),
                help="Above 1: avoid repeating recent tokens.",
            ),
            click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes a sampled answer repeatable."),
            click.option(
                "--stop",
                multiple=True,
                metavar="TEXT",
                help="End the answer before this text. May be repeated.",
            ),
            click.option(
                "--think/--no-think",
                default=None,
                help="Whether the model thinks before it answers.  [default: as its chat template does]",
            ),
            click.option(
                "--image-tokens",
                type=click.IntRange(1),
                metavar="N",
                help="Tokens of an image at most, where a family takes any size: 70, 140, 280, 560 or 1120 of Gemma 4, any "
                "number of Qwen2-VL and later.  [default: the checkpoint's]",
            ),
        ]
    ):
        function = option(function)
    return function
