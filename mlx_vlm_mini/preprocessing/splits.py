"""Split images: an image enlarged or reduced to whole square tiles, these row by row, and the whole as one tile behind.

Source: Idefics3 (arXiv:2408.12637); models/idefics3 of huggingface/transformers, Pillow path. Unlike `tiles.py`'s, the
grid keeps an image's size, not its shape alone; and the whole is made of the enlarged image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError, ImageError

from .frame import Frame

_MOST_PIXELS = 1 << 26  # of an image in whole tiles: a very long and narrow one that is not resized first
LONGEST = 4096  # pixels along an image's longer side at most, before tiles are counted


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How an image processor cuts."""

    tile_size: int
    longest_edge: int | None
    """Pixels along the longer side before tiles are counted, smaller images being enlarged; None: the image's own."""
    split: bool
    """Whether an image is cut; otherwise it is squashed to one tile."""
    max_tiles: int | None = None
    """Tiles of an image at most, without the whole: `longest_edge` becomes as many tiles as that allows."""

    def __post_init__(self) -> None:
        if self.max_tiles is not None and self.max_tiles < 1:
            raise CheckpointError(f"an image is cut into a whole number of tiles, 1 or more, not {self.max_tiles!r}")


def _scale(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width with a longer side of so many pixels, the shorter one being even, and none above `LONGEST`."""
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = int(longest / ratio), longest
        height = max(height + height % 2, 1)
    else:
        height, width = longest, int(longest * ratio)
        width = max(width + width % 2, 1)
    ratio = width / height
    if width >= height and width > LONGEST:
        return max(int(LONGEST / ratio), 1), LONGEST
    if height > width and height > LONGEST:
        return LONGEST, max(int(LONGEST * ratio), 1)
    return height, width


def _fill(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width up to whole tiles: the longer one first, the other one in shape and then up, too."""
    height, width = size
    ratio = width / height
    if width >= height:
        width = ceil(width / side) * side
        return ceil(int(width / ratio) / side) * side, width
    height = ceil(height / side) * side
    return height, ceil(int(height * ratio) / side) * side


def _limit(size: tuple[int, int], splits: Splits) -> Splits:
    """The same without `max_tiles`, its longest edge being the largest that keeps to it; not split where none does."""
    most, side = splits.max_tiles, splits.tile_size
    if most is None or not splits.split:
        return splits
    start = splits.longest_edge or max(size)
    tries = [splits.longest_edge, *range((min(start, LONGEST) - 1) // side * side, side, -side)]
    for edge in tries if most > 1 else ():
        limited = replace(splits, longest_edge=edge, max_tiles=None)
        height, width = steps(size, limited)[-1]
        if height // side * (width // side) <= most:
            return limited
    return replace(splits, split=False)


def steps(size: tuple[int, int], splits: Splits) -> list[tuple[int, int]]:
    """Heights and widths that an image of `size` takes one after another before it is cut; in the end whole tiles."""
    splits, side = _limit(size, splits), splits.tile_size
    scaled = [] if splits.longest_edge is None else [_scale(size, splits.longest_edge)]
    return [*scaled, _fill((scaled or [size])[-1], side) if splits.split else (side, side)]


def choose_split(size: tuple[int, int], splits: Splits) -> tuple[int, int]:
    """Rows and columns for an image of `size`, height and width in pixels; where they are 1 and 1 nothing is cut."""
    height, width = steps(size, splits)[-1]
    return height // splits.tile_size, width // splits.tile_size


def cut_splits(image: Image.Image, splits: Splits, resample: int) -> Iterator[Image.Image]:
    """An image's tiles row by row, then its whole.

    Raises:
        ImageError: it would take gigabytes.
    """
    kernel, side, size = Image.Resampling(resample), splits.tile_size, (image.height, image.width)
    for height, width in steps(size, splits):
        if height * width > _MOST_PIXELS:
            raise ImageError(f"an image of {size[1]}x{size[0]} pixels becomes one of {width}x{height}: crop it first")
        image = image.resize((width, height), resample=kernel)
    rows, columns = image.height // side, image.width // side
    if rows * columns > 1:
        for left, top in _corners(rows, columns, side):
            yield image.crop((left, top, left + side, top + side))
        image = image.resize((side, side), resample=kernel)
    yield image


def split_frames(size: tuple[int, int], splits: Splits) -> list[tuple[Frame, tuple[int, int]]]:
    """Where what `cut_splits` gives lies in an image of `size`, and each one's own size: height and width."""
    (rows, columns), side = choose_split(size, splits), splits.tile_size
    grid = Frame().resize(size[::-1], (columns * side, rows * side))
    corners = _corners(rows, columns, side) if rows * columns > 1 else []
    whole = Frame().resize(size[::-1], (side, side))
    return [(frame, (side, side)) for frame in [*(grid.cut(*corner) for corner in corners), whole]]


def _corners(rows: int, columns: int, side: int) -> list[tuple[int, int]]:
    """Left and top of each tile, row by row."""
    return [(column * side, row * side) for row in range(rows) for column in range(columns)]
