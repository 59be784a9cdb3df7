"""Any resolution: an image -> itself squashed and its tiles, and their features -> one sequence.

Sources: LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next), LLaVA-OneVision (arXiv:2408.03326);
image_processing_utils.py, image_transforms.py, models/llava_next and models/llava_onevision of
huggingface/transformers; llava/mm_utils.py and llava/model/llava_arch.py of haotian-liu/LLaVA.

Sizes are (height, width). A pinpoint is a size in pixels that tiles fill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .config import TileMerge
from .errors import CheckpointError
from .places import Frame

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


def _shrink(grid: mx.array, shape: Size, corner: tuple[int, int] | None) -> mx.array:
    """A smaller grid, bilinear between the nearest features, as torch's `interpolate` computes it.

    Args:
        grid: float[rows, columns, C].
        corner: gives in place of the mixture one of the four features that it is made of.
    """
    dtype = grid.dtype
    for axis, wanted in enumerate(shape):
        held = grid.shape[axis]
        place = (np.arange(wanted, dtype=np.float32) + 0.5) * (np.float32(held) / np.float32(wanted)) - np.float32(0.5)
        place = np.maximum(place, 0)
        low = place.astype(np.int32)
        ends = [mx.take(grid, mx.array(each), axis=axis) for each in (low, np.minimum(low + 1, held - 1))]
        share = mx.expand_dims(mx.array(place - low), (1, 2) if axis == 0 else (0, 2))
        grid = ends[0] * (1 - share) + ends[1] * share if corner is None else ends[corner[axis]]
    return grid.astype(dtype)


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


def pack(
    features: mx.array,
    newline: mx.array | None,
    size: Size,
    pinpoints: Sequence[Size],
    *,
    tile_size: int,
    merge: TileMerge = "unpad",
    most_tiles: int | None = None,
    corner: tuple[int, int] | None = None,
) -> mx.array:
    """The squashed image's features, then the tiles'.

    Args:
        features: float[1 + tiles, P, C].
        newline: float[C], where `merge` puts one behind each row.
        size: the image's, in pixels.
        tile_size: pixels along a tile.
        most_tiles: tiles whose features the grid may have; one that is a fifth larger is shrunk. An image that was not
            cut, because it is not alone, is its features and a newline then.
        corner: of a grid that is shrunk, see `_shrink`.

    Returns:
        float[tokens, C].

    Raises:
        CheckpointError: the image came in another number of tiles.
    """
    down, across = (pixels // tile_size for pixels in choose_pinpoint(size, pinpoints))
    count, P, C = features.shape
    if count == 1 and most_tiles is not None and newline is not None:
        return mx.concatenate([features[0], newline.astype(features.dtype)[None]])
    if count != 1 + down * across:
        raise CheckpointError(
            f"an image of {size[1]}x{size[0]} pixels has {down * across} tiles by config.json's image_grid_pinpoints, "
            f"the image processor gives {count - 1}"
        )
    if merge == "flat":
        return features.flatten(0, 1)
    side = isqrt(P)
    rows, columns = down * side, across * side
    grid = features[1:].reshape(down, across, side, side, C).transpose(0, 2, 1, 3, 4).reshape(rows, columns, C)
    if newline is None:
        return mx.concatenate([features[0], grid.flatten(0, 1)])
    above, left = _bars(size, rows, columns, merge)
    grid = grid[above : rows - above, left : columns - left]  # (rows, columns, C), without the bars
    shape = _shrunk(grid.shape[0], grid.shape[1], None if most_tiles is None else most_tiles * P)
    grid = grid if shape == grid.shape[:2] else _shrink(grid, shape, corner)
    newlines = mx.broadcast_to(newline.astype(features.dtype), (grid.shape[0], 1, C))
    lines = mx.concatenate([grid, newlines], axis=1).flatten(0, 1)
    return mx.concatenate([features[0], lines])
