"""`mlx-vlm-mini scenes`: pictures of simple objects with questions, to train on or to test with."""

from pathlib import Path

import click

from .status import Status


@click.command("scenes")
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="Lines to write.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed, the same set.")
@click.option("--most", type=click.IntRange(1, 4), default=4, show_default=True, help="Objects in a picture at most.")
@click.option(
    "--pairs", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Share of lines with two pictures."
)
@click.option(
    "--digits",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of lines with a handwritten digit (needs scikit-learn).",
)
@click.option(
    "--close",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of lines with one object that fills the picture.",
)
@click.option(
    "--radii",
    type=(click.FloatRange(0.05, 0.5), click.FloatRange(0.05, 0.5)),
    default=(0.2, 0.45),
    show_default=True,
    help="Least and largest radius of such objects, in shorter sides of the picture.",
)
@click.option(
    "--words",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Length of a dialogue, about; 0 leaves the description alone.",
)
@click.option(
    "--test",
    is_flag=True,
    help="One question a line, with its kind, as `eval` wants it; digits that training never sees.",
)
def command(
    destination: Path,
    count: int,
    seed: int,
    most: int,
    pairs: float,
    digits: float,
    close: float,
    radii: tuple[float, float],
    words: int,
    test: bool,
) -> None:
    """Write pictures of simple objects and conversations about them into the new folder OUT.

    \b
    Example:
      mlx-vlm-mini scenes scenes-train --count 20000 --seed 1
      mlx-vlm-mini scenes scenes-test --count 1000 --seed 2 --test
    """
    from mlx_vlm_mini.data.questions import write_scenes
    from mlx_vlm_mini.errors import CheckpointError
    from mlx_vlm_mini.files import written_whole

    if destination.exists():
        raise CheckpointError(f"{destination} exists; name another folder or remove it first")
    with Status() as status, written_whole(destination) as work:
        write_scenes(
            work, count, seed=seed, most=most, pairs=pairs, digits=digits, close=close, radii=radii, words=words,
            test=test,
            progress=lambda done, total: status.show(f"drawing: {done} of {total}"),
        )  # fmt: skip
    click.echo(f"{destination / 'scenes.jsonl'}: {count} lines")
