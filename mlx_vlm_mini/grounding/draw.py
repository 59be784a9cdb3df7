"""Draw what an answer says about places on its image: boxes, points, masks, each with its label."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_vlm_mini.images.source import ImageSource, open_image

from .detections import Detection

COLOURS = (
    (230, 25, 75), (0, 130, 200), (255, 225, 25), (60, 180, 75),
    (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
)  # fmt: skip
_MASK_OPACITY = 0.45

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; right and bottom exclusive."""


def draw_detections(image: ImageSource, detections: Sequence[Detection]) -> Image.Image:
    """The image with boxes, points, masks and labels over it, in its own size.

    Lines have a dark rim and labels a ground of their own, so that they can be read on any picture. An empty or
    inside-out box is drawn as the thin or turned one that it is.

    Args:
        image: anything that `open_image` opens; it is not changed.

    Raises:
        ImageError: it cannot be opened.
    """
    canvas = open_image(image, whole=True).copy()
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(detections))]
    for detection, colour in zip(detections, colours, strict=True):
        if detection.mask is not None:
            _fill(canvas, detection.mask, colour)
    draw = ImageDraw.Draw(canvas)
    line = max(1, round(min(canvas.size) / 200))
    for detection, colour in zip(detections, colours, strict=True):
        if detection.corners:
            for width, shade in ((line + 2, (0, 0, 0)), (line, colour)):
                draw.polygon(detection.corners, outline=shade, width=width)
        elif detection.box is not None:
            _outline(draw, _upright(detection.box), line, colour)
        for x, y in detection.points:
            for radius, shade in ((3 * line + 1, (0, 0, 0)), (3 * line, colour)):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    taken: list[Box] = []
    for detection, colour in zip(detections, colours, strict=True):
        if detection.label:
            _write(draw, detection, colour, line, taken)
    return canvas


def _upright(box: Box) -> Box:
    """The box with its corners in order, and at least one pixel large."""
    left, right = sorted(box[::2])
    top, bottom = sorted(box[1::2])
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _fill(canvas: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Tint the mask's pixels; those at its edge get the full colour."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    alpha = np.where(inner, round(255 * _MASK_OPACITY), 255).astype(np.uint8) * mask
    canvas.paste(colour, mask=Image.fromarray(alpha))


def _outline(draw: ImageDraw.ImageDraw, box: Box, line: int, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    for grow, width, shade in ((1, line + 2, (0, 0, 0)), (0, line, colour)):
        draw.rectangle((left - grow, top - grow, right - 1 + grow, bottom - 1 + grow), outline=shade, width=width)


def _write(
    draw: ImageDraw.ImageDraw, detection: Detection, colour: tuple[int, int, int], line: int, taken: list[Box]
) -> None:
    """Write the label where it covers no other one, if there is such a place, and note where that is."""
    width, height = draw.im.size
    font = ImageFont.load_default(size=max(10, round(min(width, height) / 28)))
    text, pad = detection.label, line + 1
    while len(text) > 1 and draw.textlength(text, font) + 2 * pad > width:
        text = text.removesuffix("…")[:-1] + "…"
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    size = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    options = [place for corner in _places(detection, size) if (place := _inside(corner, size, width, height))]
    free = [place for place in options if not any(_overlap(place, other) for other in taken)]
    place = (free or options)[0]
    taken.append(place)
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((place[0] + pad - left, place[1] + pad - top), text, (0, 0, 0) if bright else (255, 255, 255), font)


def _places(detection: Detection, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Left and top of where a label may stand, the best first: above its box, inside, below, further down inside."""
    if detection.box is not None:
        left, top, right, bottom = _upright(detection.box)
    elif detection.points:
        (x, y), *_ = detection.points
        left, top, right, bottom = round(x), round(y), round(x), round(y)
    elif detection.mask is not None and detection.mask.any():
        rows, columns = np.nonzero(detection.mask.any(axis=1))[0], np.nonzero(detection.mask.any(axis=0))[0]
        left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    else:
        left, top, right, bottom = 0, 0, 0, 0
    width, height = size
    yield left, top - height
    yield left, top
    yield right - width, top - height
    yield left, bottom
    yield right - width, bottom - height
    yield from ((left, top + i * height) for i in range(1, 50))


def _inside(corner: tuple[int, int], size: tuple[int, int], width: int, height: int) -> Box:
    """A label of this size, moved into the picture."""
    left = max(0, min(corner[0], width - size[0]))
    top = max(0, min(corner[1], height - size[1]))
    return left, top, left + size[0], top + size[1]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
