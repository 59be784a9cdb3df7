"""`mlx-vlm-mini convert`: a checkpoint in, a smaller MLX checkpoint out."""

import re
import sys
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from mlx_vlm_mini.errors import CheckpointError

from .options import DTYPES, original_options
from .status import Status

if TYPE_CHECKING:
    from mlx_vlm_mini.convert import Preview

BITS = click.Choice(["2", "3", "4", "5", "6", "8"])


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION", type=click.Path(), required=False)
@click.option("-q", "--bits", type=BITS, help="Quantize the decoder, its embeddings and its head to this many bits.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--mode",
    type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]),
    default="affine",
    show_default=True,
    help="The others have bits and groups of their own.",
)
@click.option("--vision-bits", type=BITS, help="Bits of the vision tower, which stays as it is by default.")
@click.option("--projector-bits", type=BITS, help="Bits of the projector, likewise.")
@click.option("--decoder-bits", type=BITS, help="Bits of the decoder's layers, where others than -q.")
@click.option("--embedding-bits", type=BITS, help="Bits of the token embeddings, where others than -q.")
@click.option("--head-bits", type=BITS, help="Bits of the head, where others than -q.")
@click.option("--dtype", type=DTYPES, help="Type of what stays in floating point.  [default: as it is]")
@click.option(
    "--recipe",
    type=click.Choice(["uniform", "mixed", "auto"]),
    help="Where bits go: the same everywhere, more for some layers, or by measured losses.  [default: uniform; auto with a budget]",
)
@click.option(
    "--bits-per-weight", type=click.FloatRange(2), metavar="BITS", help="Budget of recipe auto, over the whole model."
)
@click.option(
    "--method",
    type=click.Choice(["round", "gptq"]),
    default="round",
    show_default=True,
    help="gptq makes up for each weight's error in others; it takes longer.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True),
    help="Folder of pictures or JSONL of conversations for auto and gptq.  [default: drawn scenes]",
)
@click.option("--no-check", is_flag=True, help="Do not compare the result with SOURCE.")
@click.option("--dequantize", is_flag=True, help="Bring what SOURCE holds quantized back to floating point.")
@click.option("--allow-nan", is_flag=True, help="Convert weights that are NaN or infinite, too.")
@click.option("--force", is_flag=True, help="Replace DESTINATION, a checkpoint folder, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop; reads headers only, of Hub models too.")
@click.option("--upload", metavar="REPO", help="Upload the result to the Hub, with a model card.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@original_options
@click.option("--base", metavar="LLAMA", help="Weights to add to those of a delta, an original LLaVA's first form.")
def command(
    source: str,
    destination: str | None,
    revision: str | None,
    force: bool,
    dry_run: bool,
    upload: str | None,
    no_check: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a checkpoint folder or a Hub name, into the new folder DESTINATION.

    Stopped or killed it leaves no DESTINATION, and the same command goes on from the files that were finished.

    \b
    Example:
      mlx-vlm-mini convert llava-hf/llava-1.5-7b-hf llava-4bit -q 4
    """
    from mlx_vlm_mini.convert import convert, preview

    settings = _settings(options)
    if dry_run:
        _show(preview(source, revision=revision, **settings), out=True)
        return
    if destination is None:
        raise click.UsageError("Missing argument 'DESTINATION': only --dry-run does without.")
    if upload is not None:
        from mlx_vlm_mini.convert.upload import check_access

        check_access(upload)
    done, total = 0, 1
    bar: Any = None
    with Status() as status, ExitStack() as stack:  # the bar begins when the weights are here, and ends when written

        def progress(*numbers: int) -> None:
            nonlocal bar, done, total
            done, total = numbers
            if bar is None:  # not before, or its time left would count what came before, too
                status.clear()
                bar = stack.enter_context(
                    click.progressbar(
                        length=total,
                        label="converting",
                        file=sys.stderr,
                        hidden=not sys.stderr.isatty(),
                        item_show_func=lambda _: f"{_size(done)} of {_size(total)}",
                    )
                )
            bar.update(done - bar.pos)

        def say(what: str) -> None:
            if done:
                stack.close()
            status.show(what)

        def announce(plan: "Preview") -> None:
            status.clear()
            _show(plan)

        report = convert(
            source,
            destination,
            revision=revision,
            force=force,
            announce=announce,
            progress=progress,
            say=say,
            check=not no_check,
            **settings,
        )
    for name, count in report.not_finite.items():
        click.echo(f"NaN or infinite: {count:,} values of {name}", err=True)
    plan = report.preview
    click.echo(
        f"{report.destination}: {_size(plan.bytes)} from {_size(plan.source_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per weight, in {_duration(report.seconds)}"
    )
    if report.check is not None:
        for what, value in report.check.rows():
            click.echo(f"{what:<24} {value}", err=True)
        if report.check.problems:
            raise CheckpointError(
                f"{report.destination} is broken: {'; '.join(report.check.problems)}; it is kept for you to look at"
            )
    if upload is not None:
        from mlx_vlm_mini.convert.upload import upload_folder

        click.echo(upload_folder(report, upload))


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The command's options as fields of `convert.Settings`."""
    parts = {
        "vision": "vision",
        "projector": "projector",
        "decoder": "decoder",
        "embedding": "embeddings",
        "head": "head",
    }
    given = {part: options.pop(f"{name}_bits") for name, part in parts.items()}
    options["recipe"] = options["recipe"] or ("uniform" if options["bits_per_weight"] is None else "auto")
    for name in ("bits", "group_size"):
        options[name] = None if options[name] is None else int(options[name])
    return {**options, "part_bits": {part: int(bits) for part, bits in given.items() if bits is not None}}


def _show(plan: "Preview", *, out: bool = False) -> None:
    """The plan as a table: what the result is, on stdout where nothing but it was asked for."""
    rows = [("part", "weights", "stored as", "bits per weight", "size")]
    rows += [
        (part.part, f"{part.weights:,}", " + ".join(part.kinds[:4]), f"{part.bits_per_weight:.2f}", _size(part.bytes))
        for part in plan.parts
    ]
    rows.append(("all", f"{plan.weights:,}", "", f"{plan.bits_per_weight:.2f}", _size(plan.bytes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = (row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]))
        click.echo("  ".join((*left, row[3].rjust(widths[3]), row[4].rjust(widths[4]))), err=not out)
    for note in plan.notes:
        click.echo(f"note: {note}", err=not out)
    alike = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason) for name, reason in plan.skipped)
    for (name, reason), count in alike.items():
        click.echo(f"not quantized: {f'{count} times ' if count > 1 else ''}{name}, {reason}", err=not out)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
