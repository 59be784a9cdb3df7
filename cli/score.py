"""`mlx-vlm-mini score`: which text fits an image."""

import json

import click

from .status import Status


@click.command("score")
@click.argument("model", metavar="MODEL")
@click.option("-i", "--image", "images", multiple=True, required=True, metavar="IMAGE", help="May be repeated.")
@click.option("-p", "--text", "texts", multiple=True, required=True, metavar="TEXT", help="May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the logits.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
def command(model: str, images: tuple[str, ...], texts: tuple[str, ...], as_json: bool, revision: str | None) -> None:
    """Say with the CLIP checkpoint MODEL how probable each TEXT is for each IMAGE, among the texts given.

    \b
    Example:
      mlx-vlm-mini score openai/clip-vit-base-patch32 -i photo.jpg -p "a photo of a cat" -p "a photo of a dog"
    """
    from mlx_vlm_mini import load_scorer
    from mlx_vlm_mini.image import open_image

    opened = [open_image(image) for image in images]
    with Status() as status:
        status.show(f"loading {model}")
        scorer = load_scorer(model, revision=revision)
        status.show(f"scoring {len(images)} image{'s' if len(images) > 1 else ''}")
        logits, probabilities = scorer.logits(opened, texts), scorer.probabilities(opened, texts)
    if as_json:
        rows = zip(images, probabilities.tolist(), logits.tolist(), strict=True)
        scores = [{"image": image, "probabilities": odds, "logits": row} for image, odds, row in rows]
        click.echo(json.dumps({"texts": texts, "scores": scores}, ensure_ascii=False))
        return
    for image, odds in zip(images, probabilities, strict=True):
        if len(images) > 1:
            click.echo(image)
        for probability, text in sorted(zip(odds.tolist(), texts, strict=True), key=lambda pair: -pair[0]):
            click.echo(f"{100 * probability:5.1f} %  {text}")
