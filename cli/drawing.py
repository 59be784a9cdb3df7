"""--draw: the places that an answer names, on the image."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from PIL import Image

    from mlx_vlm_mini.grounding.mask_decoder import MaskDecoder


def drawing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--draw and --mask-decoder."""
    for option in (
        click.option(
            "--mask-decoder", metavar="FILE", help="PaliGemma's vae-oid.npz, for masks: a path or its Hub address."
        ),
        click.option(
            "--draw",
            metavar="FILE.png",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write the image with the boxes, points and masks that the answer names.",
        ),
    ):
        function = option(function)
    return function


def check_drawing(file: Path | None, mask_decoder: str | None, images: Sequence[str]) -> None:
    """Refuse what cannot be drawn before anything is loaded."""
    if file is None:
        if mask_decoder is not None:
            raise click.UsageError("--mask-decoder needs --draw, which draws the masks")
        return
    if len(images) != 1:
        raise click.UsageError(f"--draw needs one image to draw on, not {len(images)}")
    if file.suffix.lower() != ".png":
        raise click.UsageError(f"--draw writes PNG files: {file} does not end in .png")
    if not file.parent.is_dir():
        raise click.UsageError(f"--draw: there is no folder {file.parent}")
    from mlx_vlm_mini.images.names import find_file

    given = find_file(images[0])
    if file.exists() and given.exists() and file.samefile(given):
        raise click.UsageError(_OVERWRITES.format(file))


_OVERWRITES = "--draw would overwrite the image itself: give another name than {}"


def check_not_given(file: Path | None, data: bytes) -> None:
    """The same for an image that came by stdin: a file that holds its bytes is the image, whoever piped it."""
    if file is not None and file.is_file() and file.stat().st_size == len(data) and file.read_bytes() == data:
        raise click.UsageError(_OVERWRITES.format(file))


def find_mask_decoder(given: str | None, model: str) -> "MaskDecoder | None":
    """The mask decoder of a path or an address, or of the model's own folder, where there is one."""
    from mlx_vlm_mini.grounding.mask_decoder import FILE, load_mask_decoder

    beside = Path(model) / FILE
    if given is None and not beside.is_file():
        return None
    return load_mask_decoder(given or beside)


def draw_answer(
    text: str, image: "Image.Image", file: Path, decode_masks: "MaskDecoder | None", scale: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """Write the image with what the answer names, unchanged where that is nothing; say what was found, JSON-ready.

    `text` has the answer's special tokens, and `scale` is `Processor.answer_scale`'s.
    """
    from mlx_vlm_mini.grounding.detections import find_detections
    from mlx_vlm_mini.grounding.draw import draw_detections
    from mlx_vlm_mini.grounding.mask_decoder import ADDRESS, FILE

    found = find_detections(text, height=image.height, width=image.width, decode_masks=decode_masks, scale=scale)
    if not found:
        click.echo(f"the answer names no boxes: {file} is the image as it was", err=True)
    elif decode_masks is None and any(each.mask_codes for each in found):
        click.echo(
            f"the answer names masks, only its boxes are drawn: for masks download {ADDRESS} and give --mask-decoder {FILE}",
            err=True,
        )
    png = io.BytesIO()
    draw_detections(image, found).save(png, "PNG")
    file.write_bytes(png.getvalue())
    return [
        {"label": each.label, "box": each.box, "mask_codes": each.mask_codes}
        | ({"points": each.points} if each.points else {})
        | ({"corners": each.corners} if each.corners else {})
        for each in found
    ]
