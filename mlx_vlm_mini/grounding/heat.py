"""Heat maps: attention laid over the pictures that it went to."""

from dataclasses import replace
from math import ceil, sqrt

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.images.source import open_image

from .attended import AnswerAttention, ImageAttention
from .places import lay_over

_STOPS = np.array([(22, 14, 60), (122, 28, 109), (221, 81, 58), (252, 172, 44), (255, 255, 190)], dtype=np.float64)
_SIDE = 1024  # pixels along a picture at most
_THUMBNAIL = 176  # pixels along one of a contact sheet
_GAP, _BETWEEN, _LINE, _FONT = 14, 3, 18, 13  # pixels; the second between pictures of one token


def draw_attention(found: AnswerAttention, token: int | None = None) -> Image.Image:
    """The pictures with the attention of a token of the answer over them, or a contact sheet of all tokens.

    A picture's colours count how much weight a place has for its area; the brightest is the most that the token has
    anywhere, in whichever picture. On the sheet stand, behind the mean of all tokens, each token and what part of its
    attention the images have. Pictures of more than 1024 pixels along a side are drawn smaller, small ones on the sheet
    larger.

    Args:
        token: its number in the answer; negative ones count from the end.

    Raises:
        ImageError: a picture is not there any more, or is another one.
    """
    found = found.mean()
    if token is not None:
        return _side_by_side(_over(found, open_pictures(found, _SIDE), np.arange(len(found.tokens))[token]))
    pictures = open_pictures(found, _THUMBNAIL, _THUMBNAIL)
    what, whole = ("words", found.shares.sum()) if found.drawn else ("tokens", found.shares.mean())
    cells = [(f"all {len(found.tokens)} {what}", float(whole), mean_token(found), 0)]
    cells += [(found.label(t), float(share), found, t) for t, share in enumerate(found.shares)]
    drawn = [(f"{share:.0%}  {text}", _side_by_side(_over(of, pictures, t))) for text, share, of, t in cells]
    return _sheet(drawn)


def mean_token(found: AnswerAttention) -> AnswerAttention:
    """The answer as if it had one token, whose attention is the mean of all."""
    images = tuple(replace(image, weights=image.weights.mean(axis=0, keepdims=True)) for image in found.mean().images)
    return replace(found.mean(), images=images)


def open_pictures(found: AnswerAttention, most: int, least: int = 1) -> list[Image.Image]:
    """The pictures, their longer side brought to at most and at least so many pixels.

    Raises:
        ImageError: one is not there any more, or is another one.
    """
    return [_open(image, most, least) for image in found.images]


def _open(image: ImageAttention, most: int, least: int) -> Image.Image:
    origin = image.origin
    opened = open_image(origin.path if origin.data is None and origin.path is not None else origin)
    if (opened.height, opened.width) != image.size:
        raise ImageError(f"{origin.name} is {opened.width}x{opened.height} pixels now, it was another picture before")
    scale = max(min(1.0, most / max(opened.size)), least / max(opened.size))
    return opened.resize((max(1, round(opened.width * scale)), max(1, round(opened.height * scale))))


def heat_of(found: AnswerAttention, token: int, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """A token's attention over each picture, 1 being the most that it has anywhere for the area.

    Args:
        found: reduced.
        sizes: rows and columns of the grid that is wanted on each.

    Returns:
        float64[rows, columns] of each.
    """
    heats = []
    for image, (rows, columns) in zip(found.images, sizes, strict=True):
        heats.append(lay_over(image.weights[token], image.boxes, image.size, (rows, columns)) * (rows * columns))
    most = max(float(heat.max()) for heat in heats)
    return [heat / most if most > 0 else heat for heat in heats]


def colour(heat: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours, dark to bright, 1 nearly opaque: uint8[..., 4]."""
    at = np.clip(heat, 0, 1)
    stops = np.linspace(0, 1, len(_STOPS))
    channels = [np.interp(at, stops, _STOPS[:, channel]) for channel in range(3)]
    return np.stack([*channels, 255 * (0.45 + 0.4 * np.sqrt(at))], axis=-1).round().astype(np.uint8)


def _over(found: AnswerAttention, pictures: list[Image.Image], token: int) -> list[Image.Image]:
    heats = heat_of(found, token, [(picture.height, picture.width) for picture in pictures])
    drawn = []
    for picture, heat in zip(pictures, heats, strict=True):
        grey = ImageOps.grayscale(picture).convert("RGBA")
        drawn.append(Image.alpha_composite(grey, Image.fromarray(colour(heat))).convert("RGB"))
    return drawn


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + _BETWEEN * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + _BETWEEN
    return canvas


def _sheet(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Captions under pictures of one size, row by row, about as wide as high."""
    font = ImageFont.load_default(size=_FONT)
    width, height = (max(side) for side in zip(*(picture.size for _, picture in cells), strict=True))
    width, height = max(width, _THUMBNAIL) + _GAP, height + _LINE + _GAP
    columns = min(len(cells), max(1, ceil(sqrt(len(cells) * height / width * 1.4))))
    rows = ceil(len(cells) / columns)
    canvas = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (caption, picture) in enumerate(cells):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        canvas.paste(picture, (left, top))
        caption = "".join(letter if letter.isprintable() else "\N{MIDDLE DOT}" for letter in caption)
        while len(caption) > 1 and draw.textlength(caption, font) > width - _GAP:
            caption = caption.removesuffix("…")[:-1] + "…"
        draw.text((left, top + picture.height + 2), caption, "black", font)
    return canvas
