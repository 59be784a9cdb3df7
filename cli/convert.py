"""`mlx-vlm-mini convert`: a checkpoint in, a smaller MLX checkpoint out."""

import sys
from typing import Any

import click

from .options import DTYPES


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION", type=click.Path())
@click.option("-q", "--bits", type=click.Choice(["4", "8"]), help="Quantize the decoder to this many bits.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option("--dtype", type=DTYPES, help="Type of what stays in floating point.  [default: as it is]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
def command(source: str, destination: str, bits: str | None, group_size: str, dtype: Any, revision: str | None) -> None:
    """Convert SOURCE, a checkpoint folder or a Hub name, into the new folder DESTINATION.

    \b
    Example:
      mlx-vlm-mini convert llava-hf/llava-1.5-7b-hf llava-4bit -q 4
    """
    from mlx_vlm_mini.convert import convert

    with click.progressbar(length=0, label="converting", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        report = convert(
            source,
            destination,
            bits=None if bits is None else int(bits),
            group_size=int(group_size),
            dtype=dtype,
            revision=revision,
            progress=progress,
        )
    for name, reason in report.skipped:
        click.echo(f"not quantized: {name}, {reason}", err=True)
    click.echo(
        f"{report.destination}: {report.bytes / 1e6:,.1f} MB from {report.source_bytes / 1e6:,.1f} MB, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
