"""`mlx-vlm-mini rm`: a model leaves the Hub's cache."""

import click


@click.command("rm")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(name: str, yes: bool) -> None:
    """Delete the model NAME from the Hub's cache. Folders elsewhere are never touched.

    \b
    Example:
      mlx-vlm-mini rm HuggingFaceTB/SmolVLM-256M-Instruct
    """
    from mlx_vlm_mini.checkpoints.cached import find_cached, remove_cached

    found = find_cached(name)
    if not yes:
        click.confirm(f"Delete {found.name}, {found.bytes / 1e9:.2f} GB?", abort=True, err=True)
    click.echo(f"deleted {found.name}, {remove_cached(found) / 1e9:.2f} GB", err=True)
