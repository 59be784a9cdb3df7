"""Dynamic tiles: an image -> a grid of square tiles, nearest to it in shape, and the whole, small, behind them.

Source: InternVL 1.5 (arXiv:2404.16821); models/got_ocr2, which does the same, and granite_docling of
huggingface/transformers.
"""

from dataclasses import dataclass, replace

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError

from .frame import Frame

_MOST_SIDE = 16  # of a page: there are no markers for more
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

    def budget(self, size: tuple[int, int]) -> int:
        """Tiles at most of an image of `size`, height and width in pixels."""
        return self.max_tiles

    @property
    def most_side(self) -> int:
        """Tiles along a side at most."""
        return self.max_tiles

    @property
    def longest(self) -> tuple[int, int]:
        """Height and width of an image that is cut into most tiles."""
        return (1, self.max_tiles)


@dataclass(frozen=True, kw_only=True)
class PageTiles(Tiles):
    """Those of pages (Granite-Docling): at most 16 along a side, more of them of wide pages that they would shrink, and
    each by a coarse or a fine way."""

    fine: bool
    """Four times the tokens a tile."""
    dense_tiles: int
    """Tiles at most of pages that the limits below choose; 0: of none."""
    dense_scale: float
    """Above which a page is not shrunk enough: pixels along the grid to those along the page; 0: it is not asked."""
    dense_aspects: tuple[float, float]
    """Width by height above the first and at most the second; 0: it is not asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.dense_tiles) is not int or not 0 <= self.dense_tiles <= _MOST:
            raise CheckpointError(
                f"a dense page is cut into a whole number of tiles, 0 to {_MOST}, not {self.dense_tiles!r}"
            )

    @property
    def most_side(self) -> int:
        return min(max(self.max_tiles, self.dense_tiles), _MOST_SIDE)

    @property
    def longest(self) -> tuple[int, int]:
        far, sides = _MOST * self.tile_size, range(1, self.most_side + 1)
        return max(((far * rows, far * columns) for rows in sides for columns in sides), key=self._count)

    def _count(self, size: tuple[int, int]) -> int:
        rows, columns = choose_grid(size, self)
        return rows * columns

    def budget(self, size: tuple[int, int]) -> int:
        aspect, (over, most) = size[1] / size[0], self.dense_aspects
        asked = self.dense_tiles and (self.dense_scale > 0 or over > 0) and self.max_tiles > 1
        if not asked or (over > 0 and aspect <= over) or (0 < most < aspect):
            return self.max_tiles
        columns = choose_grid(size, replace(self, dense_tiles=0))[1]
        shrinks = self.dense_scale <= 0 or columns * self.tile_size / size[1] < self.dense_scale
        return self.dense_tiles if shrinks else self.max_tiles


def choose_grid(size: tuple[int, int], tiles: Tiles) -> tuple[int, int]:
    """Rows and columns for an image of `size`, height and width in pixels.

    The grid whose width by height is nearest to the image's, by their difference. Of equally near ones the first, or
    the last whose pixels are fewer than twice the image's; small grids come first, of two of one size the higher.
    """
    height, width = size
    few, many, side = tiles.min_tiles, tiles.budget(size), tiles.most_side
    grids = [(w, h) for w in range(1, min(many, side) + 1) for h in range(1, min(many // w, side) + 1) if w * h >= few]
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
