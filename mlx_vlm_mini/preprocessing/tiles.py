"""Dynamic tiles: an image -> a grid of square tiles, nearest to it in shape, and the whole, small, behind them.

Source: InternVL 1.5 (arXiv:2404.16821); models/got_ocr2 of huggingface/transformers, which does the same.
"""

from dataclasses import dataclass

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError

from .frame import Frame

_MOST = 1000  # far above every model's 12 or 40; the grids that are compared grow with it


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How an image processor cuts: `tile_size` in pixels, and how many tiles there may be, without the thumbnail."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    """Whether the whole image, squashed to a tile, comes behind several tiles."""

    def __post_init__(self) -> None:
        for number in (self.min_tiles, self.max_tiles):
            if type(number) is not int or not 1 <= number <= _MOST:
                raise CheckpointError(f"an image is cut into a whole number of tiles, 1 to {_MOST}, not {number!r}")
        if self.min_tiles > self.max_tiles:
            raise CheckpointError(
                f"an image cannot be cut into {self.min_tiles} tiles at least and {self.max_tiles} at most"
            )


def choose_grid(size: tuple[int, int], tiles: Tiles) -> tuple[int, int]:
    """Rows and columns for an image of `size`, height and width in pixels.

    The grid whose width by height is nearest to the image's, by their difference. Of equally near ones the first, or
    the last whose pixels are fewer than twice the image's; small grids come first, of two of one size the higher.
    """
    height, width = size
    few, many = tiles.min_tiles, tiles.max_tiles
    grids = [(w, h) for w in range(1, many + 1) for h in range(1, many // w + 1) if w * h >= few]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        fills = width * height > 0.5 * tiles.tile_size**2 * columns * rows
        if difference < least or (difference == least and fills):
            best, least = (rows, columns), difference
    return best


def count_tiles(size: tuple[int, int], tiles: Tiles) -> int:
    """Rows of pixels that an image of `size`, height and width, becomes: its tiles and its thumbnail."""
    rows, columns = choose_grid(size, tiles)
    return rows * columns + int(tiles.thumbnail and rows * columns > 1)


def cut_tiles(image: Image.Image, tiles: Tiles, resample: int) -> list[Image.Image]:
    """The image squashed to its grid and cut row by row, then its thumbnail.

    Where there may be one tile only, the image comes as it is.
    """
    if tiles.max_tiles == 1:
        return [image]
    rows, columns = choose_grid((image.height, image.width), tiles)
    side, kernel = tiles.tile_size, Image.Resampling(resample)
    whole = image.resize((columns * side, rows * side), resample=kernel)
    cut = [whole.crop((left, top, left + side, top + side)) for left, top in _corners(rows, columns, side)]
    return [*cut, image.resize((side, side), resample=kernel)] if tiles.thumbnail and len(cut) > 1 else cut


def tile_frames(size: tuple[int, int], tiles: Tiles) -> list[tuple[Frame, tuple[int, int]]]:
    """Where what `cut_tiles` gives lies in an image of `size`, and each one's own size: height and width."""
    if tiles.max_tiles == 1:
        return [(Frame(), size)]
    (rows, columns), side, whole = choose_grid(size, tiles), tiles.tile_size, size[::-1]
    grid = Frame().resize(whole, (columns * side, rows * side))
    cut = [(grid.cut(*corner), (side, side)) for corner in _corners(rows, columns, side)]
    return [*cut, (Frame().resize(whole, (side, side)), (side, side))] if tiles.thumbnail and len(cut) > 1 else cut


def _corners(rows: int, columns: int, side: int) -> list[tuple[int, int]]:
    """Left and top of each tile, row by row."""
    return [(column * side, row * side) for row in range(rows) for column in range(columns)]
