"""Features of an image's tiles in the order in which the decoder reads them (LLaVA-NeXT, LLaVA-OneVision)."""

from collections.abc import Sequence
from math import isqrt

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import TileMerge
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.preprocessing.anyres import Size, _bars, _shrunk, choose_pinpoint


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
