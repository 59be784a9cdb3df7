"""A canvas of square tiles: an image as large as fits it, in its upper left corner, cut into the tiles.

Source: models/mllama of huggingface/transformers; image_transform.py of meta-llama/llama-models, which does the same.
"""

from dataclasses import dataclass
from math import floor

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import MOST_TILES
from mlx_vlm_mini.errors import CheckpointError

from .frame import Frame


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """How an image processor cuts: `tile_size` in pixels, and how many tiles there may be."""

    tile_size: int
    max_tiles: int

    def __post_init__(self) -> None:
        if type(self.max_tiles) is not int or not 1 <= self.max_tiles <= MOST_TILES:
            raise CheckpointError(
                f"an image is cut into a whole number of tiles, 1 to {MOST_TILES}, not {self.max_tiles!r}"
            )


def possible_grids(max_tiles: int) -> list[tuple[int, int]]:
    """Rows and columns of all canvases. A grid's place in the list is what positions are learned for."""
    return [(h, w) for h in range(1, max_tiles + 1) for w in range(1, max_tiles // h + 1)]


def choose_canvas(size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size`, height and width in pixels.

    The canvas that the image, kept in shape, fills with the least enlargement; where it is too large for all, with the
    least reduction. Of several the smallest area, then the first.
    """
    height, width = size
    scales = {
        (rows, columns): min(rows * canvas.tile_size / height, columns * canvas.tile_size / width)
        for rows, columns in possible_grids(canvas.max_tiles)
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales.values())
    return min((grid for grid in scales if scales[grid] == chosen), key=lambda grid: grid[0] * grid[1])


def fit_size(size: tuple[int, int], grid: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """Height and width of an image on its canvas: at least a tile's along one side, never more than the canvas's."""
    height, width = size
    most_high, most_wide = (min(max(own, tile_size), count * tile_size) for own, count in zip(size, grid, strict=True))
    if most_wide / width < most_high / height:
        return min(floor(height * (most_wide / width)) or 1, most_high), most_wide
    return most_high, min(floor(width * (most_high / height)) or 1, most_wide)


def place(image: Image.Image, canvas: Canvas, resample: int) -> Image.Image:
    """An RGB image resized and put on its canvas; what it leaves free at the right and below is black."""
    grid = choose_canvas((image.height, image.width), canvas)
    height, width = fit_size((image.height, image.width), grid, canvas.tile_size)
    whole = Image.new("RGB", (grid[1] * canvas.tile_size, grid[0] * canvas.tile_size))
    whole.paste(image.resize((width, height), resample=Image.Resampling(resample)), (0, 0))
    return whole


def canvas_frames(size: tuple[int, int], canvas: Canvas) -> list[tuple[Frame, tuple[int, int]]]:
    """Where the tiles lie in an image of `size`, and each one's own size: height and width."""
    grid, side = choose_canvas(size, canvas), canvas.tile_size
    whole = Frame().resize(size[::-1], fit_size(size, grid, side)[::-1])
    corners = [(column * side, row * side) for row in range(grid[0]) for column in range(grid[1])]
    return [(whole.cut(*corner), (side, side)) for corner in corners]


def cut_canvas(values: np.ndarray, tile_size: int) -> np.ndarray:
    """float[height, width, 3] -> float[tiles, tile_size, tile_size, 3], row by row."""
    rows, columns = values.shape[0] // tile_size, values.shape[1] // tile_size
    tiles = values.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(rows * columns, tile_size, tile_size, 3))
