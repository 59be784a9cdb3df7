"""`mlx-vlm-mini pull`: a model of the Hub is downloaded before it is needed."""

import click

from .writing import echo


@click.command("pull")
@click.argument("name")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
def command(name: str, revision: str | None) -> None:
    """Download the model NAME of the Hub into its cache, files that are read here alone, and print the folder.

    \b
    Example:
      mlx-vlm-mini pull HuggingFaceTB/SmolVLM-256M-Instruct
    """
    from mlx_vlm_mini.checkpoints.hub import find_folder, is_hub_name
    from mlx_vlm_mini.errors import CheckpointError

    if not is_hub_name(name):
        raise CheckpointError(f"{name} is no name of a model on the Hub, such as owner/model")
    echo(str(find_folder(name, revision=revision)))
