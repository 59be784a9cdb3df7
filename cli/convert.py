"""`mlx-vlm-mini convert`: a checkpoint in, a smaller MLX checkpoint out."""

import sys
from typing import Any

import click

from .options import DTYPES, original_options

BITS = click.Choice(["2", "3", "4", "5", "6", "8"])


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION", type=click.Path())
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
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@original_options
@click.option("--base", metavar="LLAMA", help="Weights to add to those of a delta, an original LLaVA's first form.")
def command(
    source: str,
    destination: str,
    bits: str | None,
    group_size: str,
    mode: Any,
    dtype: Any,
    revision: str | None,
    vision_tower: str | None,
    conversation: str | None,
    base: str | None,
    embedding_bits: str | None,
    **part_bits: str | None,
) -> None:
    """Convert SOURCE, a checkpoint folder or a Hub name, into the new folder DESTINATION.

    \b
    Example:
      mlx-vlm-mini convert llava-hf/llava-1.5-7b-hf llava-4bit -q 4
    """
    from mlx_vlm_mini.convert import convert

    chosen: dict[Any, str | None] = {name.removesuffix("_bits"): given for name, given in part_bits.items()}
    chosen["embeddings"] = embedding_bits
    with click.progressbar(length=0, label="converting", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        report = convert(
            source,
            destination,
            bits=None if bits is None else int(bits),
            group_size=int(group_size),
            mode=mode,
            part_bits={part: int(given) for part, given in chosen.items() if given is not None},
            dtype=dtype,
            revision=revision,
            vision_tower=vision_tower,
            conversation=conversation,
            base=base,
            progress=progress,
        )
    for name, reason in report.skipped:
        click.echo(f"not quantized: {name}, {reason}", err=True)
    click.echo(
        f"{report.destination}: {report.bytes / 1e6:,.1f} MB from {report.source_bytes / 1e6:,.1f} MB, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
