"""`mlx-vlm-mini models`: which models are on this machine, and whether they can be used here."""

import json
from pathlib import Path
from typing import Any

import click

from .writing import echo


@click.command("models")
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the models in the Hub's cache, and those in each FOLDER, with what they are and whether they load and fit here.

    Weights are not read.

    \b
    Example:
      mlx-vlm-mini models ~/models
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()

    from mlx_vlm_mini.checkpoints.cached import list_cached
    from mlx_vlm_mini.errors import CheckpointError

    places: list[tuple[str, Path, int]] = [(model.name, model.folder, model.bytes) for model in list_cached()]
    for place in folders:
        if not place.expanduser().is_dir():
            raise CheckpointError(f"{place} is no folder")
        inside = sorted(file.parent for file in place.expanduser().glob("*/config.json"))
        places += [(str(folder), folder, _size(folder)) for folder in inside]
    rows = [_describe(*place) for place in places]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
        return
    if not rows:
        click.echo("there are no models; `mlx-vlm-mini pull NAME` downloads one", err=True)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        size = f"{row['bytes'] / 1e9:6.2f} GB"
        if row["error"] is not None:
            echo(f"{row['name']:<{width}}  {size}  cannot be used: {row['error']}")
            continue
        bits = f"{row['bits_per_weight']:.1f} bits"
        fits = "fits" if row["fits"] else f"needs {row['needs'] / 1e9:.1f} GB, and this machine has less"
        echo(f"{row['name']:<{width}}  {size}  {row['family']}, {bits}, {fits}")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _describe(name: str, folder: Path, size: int) -> dict[str, Any]:
    """A row: what a model is, or why it cannot be used."""
    from mlx_vlm_mini.checkpoints.assembly import open_model
    from mlx_vlm_mini.checkpoints.describe import describe
    from mlx_vlm_mini.checkpoints.load import compute_dtype, plan, weights_memory
    from mlx_vlm_mini.errors import VLMError
    from mlx_vlm_mini.layers.memory import device_memory

    row: dict[str, Any] = {"name": name, "folder": str(folder), "bytes": size, "error": None}
    try:
        described = describe(folder, check=True)
        planned = plan(open_model(folder))
        needs = weights_memory(planned, compute_dtype(planned))
    except VLMError as error:
        return {**row, "error": str(error)}
    own = {key: described[key] for key in ("family", "weights", "bits_per_weight", "quantization")}
    return {**row, **own, "vision": "vision" in described, "needs": needs, "fits": needs < 0.9 * device_memory()}
