"""`mlx-vlm-mini score`: which text fits an image, or which answer a question about it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .status import Status
from .writing import echo

if TYPE_CHECKING:
    from PIL import Image

ANSWERS = 5  # of a question that are shown


@click.command("score")
@click.argument("model", metavar="MODEL")
@click.option("-i", "--image", "images", multiple=True, required=True, metavar="IMAGE", help="May be repeated.")
@click.option("-p", "--text", "texts", multiple=True, required=True, metavar="TEXT", help="May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@click.option(
    "--mode", type=click.Choice(["c", "g", "match"]), help="Of InternVL-14B: how it compares; c where nothing is said."
)
def command(
    model: str, images: tuple[str, ...], texts: tuple[str, ...], as_json: bool, revision: str | None, mode: str | None
) -> None:
    """Say how well texts fit images.

    With a CLIP checkpoint: how probable each TEXT is for each IMAGE, if one of them is right. With a ViLT for question
    answering: TEXT is a question, and its likeliest answers are shown, each with its own probability.

    InternVL-14B compares as CLIP does, by its image features alone (--mode c) or by what its query tokens saw, too (g);
    --mode match says of each TEXT by itself how probable it is that it fits. Of a text it reads 80 tokens.

    \b
    Example:
      mlx-vlm-mini score openai/clip-vit-base-patch32 -i photo.jpg -p "a photo of a cat" -p "a photo of a dog"
      mlx-vlm-mini score dandelin/vilt-b32-finetuned-vqa -i photo.jpg -p "How many cats are there?"
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    from mlx_vlm_mini.checkpoints.folder import open_checkpoint
    from mlx_vlm_mini.checkpoints.hub import find_folder
    from mlx_vlm_mini.images.source import open_image

    opened = [open_image(image) for image in images]
    with Status() as status:
        status.show(f"loading {model}")
        folder = find_folder(model, revision=revision)
        if open_checkpoint(folder).config.get("model_type") == "vilt":
            if mode is not None:
                raise click.UsageError("--mode is of InternVL-14B, and this is a ViLT")
            scores = _answer(status, str(folder), opened, texts)
        else:
            scores = _compare(status, str(folder), opened, texts, mode)
    if as_json:
        named = [{"image": image, **score} for image, score in zip(images, scores, strict=True)]
        click.echo(json.dumps({"texts": texts, "scores": named}, ensure_ascii=False))
        return
    for image, found in zip(images, scores, strict=True):
        if len(images) > 1:
            echo(image)
        if "answers" in found:
            for text, answers in zip(texts, found["answers"], strict=True):
                echo(text)
                _show([(answer["text"], answer["probability"]) for answer in answers])
        else:
            odds = zip(texts, found["probabilities"], strict=True)
            _show(sorted(odds, key=lambda pair: -pair[1]))


def _show(odds: Sequence[tuple[str, float]]) -> None:
    for text, probability in odds:
        echo(f"{100 * probability:5.1f} %  {text}")


def _compare(
    status: Status, folder: str, images: Sequence["Image.Image"], texts: Sequence[str], mode: Any
) -> list[dict[str, Any]]:
    """For each image by CLIP or InternVL-14B the texts' `probabilities` and `logits`."""
    from mlx_vlm_mini import load_scorer

    scorer = load_scorer(folder, mode=mode)
    status.show("comparing")
    logits = scorer.logits(images, texts)
    rows = zip(scorer.probabilities_of(logits).tolist(), logits.tolist(), strict=True)
    return [{"probabilities": odds, "logits": row} for odds, row in rows]


def _answer(status: Status, folder: str, images: Sequence["Image.Image"], texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each image by ViLT the likeliest `answers` to each question."""
    from mlx_vlm_mini import load_answerer

    answerer = load_answerer(folder)
    status.show("answering")
    found = [[answerer.answers(image, text, top=ANSWERS) for text in texts] for image in images]
    return [
        {"answers": [[{"text": text, "probability": odds} for text, odds in answers] for answers in of_image]}
        for of_image in found
    ]
