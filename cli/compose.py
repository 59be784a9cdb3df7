"""`mlx-vlm-mini compose`: a LLaVA checkpoint from a vision tower and a decoder."""

from typing import Any

import click

from .options import DTYPES


@click.command("compose")
@click.argument("destination", metavar="OUT", type=click.Path())
@click.option(
    "--vision", required=True, metavar="V", help="CLIP or SigLIP: folder, Hub name, or a config alone (JSON)."
)
@click.option(
    "--decoder", required=True, metavar="D", help="Llama, Mistral or Qwen2: folder, Hub name, or a config alone."
)
@click.option("--projector", type=click.Choice(["mlp", "linear"]), default="mlp", show_default=True)
@click.option("--tokenizer", metavar="T", help="Folder of the tokenizer, where the decoder's has none.")
@click.option("--feature-layer", type=int, default=-2, show_default=True, help="Hidden state that the projector reads.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the fresh weights.")
@click.option("--dtype", type=DTYPES, help="Type of the tensors in the file.  [default: float32]")
def command(
    destination: str,
    vision: str,
    decoder: str,
    projector: Any,
    tokenizer: str | None,
    feature_layer: int,
    seed: int,
    dtype: Any,
) -> None:
    """Compose a LLaVA checkpoint OUT of two parts, with a fresh projector between them, to be trained.

    \b
    Example:
      mlx-vlm-mini compose --vision openai/clip-vit-large-patch14-336 --decoder lmsys/vicuna-7b-v1.5 my-llava
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    import mlx.core as mx

    from mlx_vlm_mini.train.compose import compose

    chosen = getattr(mx, dtype) if dtype is not None else None
    compose(
        vision,
        decoder,
        destination,
        projector=projector,
        tokenizer=tokenizer,
        feature_layer=feature_layer,
        seed=seed,
        dtype=chosen,
    )
    click.echo(f"{destination}: train its projector first, then more: mlx-vlm-mini train {destination} --help")
