"""Any resolution: an image -> itself squashed and its tiles, and their features -> one sequence.

Sources: LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next), LLaVA-OneVision (arXiv:2408.03326);
image_processing_utils.py, image_transforms.py, models/llava_next and models/llava_onevision of
huggingface/transformers; llava/mm_utils.py and llava/model/llava_arch.py of haotian-liu/LLaVA.

Sizes are (height, width). A pinpoint is a size in pixels that tiles fill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

from PIL import Image

from mlx_vlm_mini.config import TileMerge
from mlx_vlm_mini.errors import CheckpointError

from .frame import Frame

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How an image processor cuts: all in pixels."""

    pinpoints: tuple[Size, ...]
    tile_size: int
    base_size: Size
    """Of the whole image, squashed, which comes before its tiles."""


def read_pinpoints(value: Any, tile_size: int, file: str) -> tuple[Size, ...]:
    """`image_grid_pinpoints` of a JSON file, checked.

    Raises:
        CheckpointError: it is no list of sizes, or tiles do not fill one of them.
    """
    if not isinstance(value, list | tuple) or not value:
        raise CheckpointError(f"{file}: image_grid_pinpoints must be a list of [height, width], not {value!r}")
    for pinpoint in value:
        pair = isinstance(pinpoint, list | tuple) and len(pinpoint) == 2
        if not pair or not all(type(side) is int and side > 0 and side % tile_size == 0 for side in pinpoint):
            raise CheckpointError(
                f"{file}: image_grid_pinpoints has {pinpoint!r}, which is no [height, width] that tiles of "
                f"{tile_size}x{tile_size} pixels fill"
            )
    return tuple((height, width) for height, width in value)


def choose_pinpoint(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of an image's pixels; the smallest of several, the first of equal ones."""
    height, width = size

    def rank(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=rank)


def cut(image: Image.Image, tiling: Tiling, resample: int) -> list[Image.Image]:
    """The image squashed to `base_size`, then its tiles row by row: fitted into the pinpoint, black bars around it."""
    (height, width), fitted, corner = _fit((image.height, image.width), tiling)
    kernel, side = Image.Resampling(resample), tiling.tile_size
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted, resample=kernel), corner)
    tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in _corners(height, width, side)]
    return [image.resize(tiling.base_size[::-1], resample=kernel), *tiles]


def cut_frames(size: Size, tiling: Tiling) -> list[tuple[Frame, Size]]:
    """Where the pieces that `cut` gives lie in an image of `size`, and each one's own size."""
    whole = size[::-1]
    (height, width), fitted, (left, top) = _fit(size, tiling)
    canvas, side = Frame().resize(whole, fitted).cut(-left, -top), tiling.tile_size
    tiles = [(canvas.cut(*corner), (side, side)) for corner in _corners(height, width, side)]
    return [(Frame().resize(whole, tiling.base_size[::-1]), tiling.base_size), *tiles]


def _fit(size: Size, tiling: Tiling) -> tuple[Size, tuple[int, int], tuple[int, int]]:
    """The pinpoint for an image; width and height of the image in it; its left and top there."""
    height, width = choose_pinpoint(size, tiling.pinpoints)
    by_width, by_height = width / size[1], height / size[0]
    if by_width < by_height:
        fitted = width, min(ceil(size[0] * by_width), height)
    else:
        fitted = min(ceil(size[1] * by_height), width), height
    return (height, width), fitted, ((width - fitted[0]) // 2, (height - fitted[1]) // 2)


def _corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Left and top of each tile, row by row."""
    return [(left, top) for top in range(0, height, side) for left in range(0, width, side)]


def _bars(size: Size, rows: int, columns: int, merge: TileMerge) -> tuple[int, int]:
    """Rows above (as many below) and columns left (as many right) of a grid of features that show no image."""
    height, width = size
    lies = width / height > columns / rows
    shown = height * (columns / width) if lies else width * (rows / height)
    if merge == "unpad":  # the original lets a hair below a whole number cost a row
        shown = round(shown, 7)
    return ((rows - int(shown)) // 2, 0) if lies else (0, (columns - int(shown)) // 2)


def _shrunk(rows: int, columns: int, most: int | None) -> Size:
    """Rows and columns that remain of a grid of features which may have that many, or a fifth more."""
    ratio = 0.0 if most is None else sqrt(rows * columns / most)
    return (max(int(rows // ratio), 1), max(int(columns // ratio), 1)) if ratio > 1.1 else (rows, columns)


def count_tokens(
    size: Size,
    pinpoints: Sequence[Size],
    *,
    tile_size: int,
    side: int,
    merge: TileMerge = "unpad",
    most_tiles: int | None = None,
) -> int:
    """Tokens of an image in the prompt, from its size alone; `pack` gives as many features.

    Args:
        size: the image's, in pixels.
        tile_size: pixels along a tile.
        side: features along a tile.
        most_tiles: tiles whose features the grid may have.
    """
    rows, columns = (pixels // tile_size * side for pixels in choose_pinpoint(size, pinpoints))
    if merge in ("grid", "flat"):
        return side * side + rows * columns
    above, left = _bars(size, rows, columns, merge)
    most = None if most_tiles is None else most_tiles * side * side
    rows, columns = _shrunk(rows - 2 * above, columns - 2 * left, most)
    return side * side + rows * (columns + 1)


def most_tokens(pinpoints: Sequence[Size], *, tile_size: int, side: int, **options: Any) -> int:
    """Tokens of the longest image: one that fills a pinpoint, or that is a little smaller where grids are shrunk."""
    longest = 0
    for height, width in pinpoints:
        rows, columns = height // tile_size * side, width // tile_size * side
        grids = [(rows, count) for count in range(1, columns + 1)] + [(count, columns) for count in range(1, rows)]
        tiling: dict[str, Any] = {"tile_size": tile_size, "side": side, **options}
        longest = max(longest, *(count_tokens(grid, [(height, width)], **tiling) for grid in grids))
    return longest
