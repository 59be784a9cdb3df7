"""`mlx-vlm-mini info`: what a checkpoint is, and whether it is whole."""

import json

import click

from .options import model_argument, original_options
from .writing import echo


@click.command("info")
@model_argument
@click.option("--check", is_flag=True, help="Check names and shapes of all tensors, and the other files, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@original_options
def command(
    model: str,
    check: bool,
    as_json: bool,
    revision: str | None,
    vision_tower: str | None,
    conversation: str | None,
) -> None:
    """Say what MODEL is: family, parts, sizes, bits per weight. Weights are not read, of Hub models not downloaded.

    \b
    Example:
      mlx-vlm-mini info llava-hf/llava-1.5-7b-hf --check
    """
    from mlx_vlm_mini.layers.cpu.blas import describe_device, use_openblas

    use_openblas()

    from mlx_vlm_mini.checkpoints.describe import describe

    described = describe(model, revision=revision, check=check, vision_tower=vision_tower, conversation=conversation)
    if as_json:
        click.echo(json.dumps(described, ensure_ascii=False))
        return
    for key, value in {**described, "computes_on": describe_device()}.items():
        if not isinstance(value, dict):
            echo(f"{key.replace('_', ' '):<16} {_shown(key, value)}")
            continue
        echo(
            f"{key.replace('_', ' '):<16} "
            + ", ".join(f"{k.replace('_', ' ')} {_shown(k, v)}" for k, v in value.items())
        )


def _shown(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "bytes" and isinstance(value, int):
        return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.2f} MB"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
