"""Slices: a picture made about as large as a fixed square, and where it was larger, cut into a grid of such pictures.

Source: MiniCPM-V (arXiv:2408.01800), section 3.2; models/minicpmv4_6 of huggingface/transformers, Pillow path. All of
them keep the picture's shape, so the whole and the slices have sizes of their own.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt

from mlx_vlm_mini.errors import CheckpointError, ImageError

from .frame import Frame

IMAGE_NUMBER = "\ue004\ue005"  # in what stands for a picture in the prompt: which of the prompt's it is
SLIVER = 16  # times the square's area that a picture may become whose short side is less than a token
MOST = 1000  # slices of a picture, far above every model's 9; the grids that are compared grow with them


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How an image processor cuts. Sizes are height and width in pixels."""

    patch_size: int
    merge: int
    """Patches along a side of what becomes one token."""
    scale: int
    """Pixels along a side of a square as large as the whole, and as a slice."""
    max_tiles: int
    """Slices of a picture at most; 1: none is cut."""
    numbered: bool
    """Whether a picture's number stands before it in the prompt."""

    def __post_init__(self) -> None:
        for name, most in (("patch_size", 1 << 12), ("merge", 1 << 12), ("scale", 1 << 13), ("max_tiles", MOST)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"images in slices need a whole number from 1 to {most} as {name}, not {value!r}")

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.patch_size * self.merge

    @property
    def max_tokens(self) -> int:
        """Tokens of a square picture with all slices; rounding gives other shapes a few more or fewer."""
        whole, piece = self.count_tokens((self.scale, self.scale))[0], self.scale // self.factor
        return whole + (self.max_tiles * piece**2 if self.max_tiles > 1 else 0)

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns for a picture of `size`: of grids with about as many slices as it has times the area the
        one whose shape is nearest, of equal ones the one with more rows. None: it is not cut."""
        height, width = size
        wanted = min(ceil(height * width / self.scale**2), self.max_tiles)
        if wanted <= 1:
            return None
        counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= self.max_tiles]
        grids = [(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
        shape = log(width / height)
        return min(grids, key=lambda grid: (abs(shape - log(grid[1] / grid[0])), -grid[0]))

    def whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """What a picture of `size` becomes as a whole: smaller, and larger, too, where it is not cut."""
        return self._fit(size)

    def cut(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """What each slice of a picture of `size` has."""
        rows, columns = grid
        return self._fit((_round(size[0], rows) / rows, _round(size[1], columns) / columns))

    def _fit(self, size: tuple[float, float]) -> tuple[int, int]:
        """The same shape in whole tokens and about the area.

        Raises:
            ImageError: it is so long that one token's height makes it far larger.
        """
        shape = size[1] / size[0]
        height = int(self.scale / sqrt(shape))
        fitted = _round(height, self.factor), _round(int(height * shape), self.factor)
        if fitted[0] * fitted[1] > SLIVER * self.scale**2:
            raise ImageError(f"an image of this shape becomes one of {fitted[1]}x{fitted[0]} pixels: crop it first")
        return fitted

    def count_tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens of a whole picture of `size`, and of each of its slices."""
        grid, whole = self.grid(size), self.whole(size)
        piece = (0, 0) if grid is None else self.cut(size, grid)
        return whole[0] * whole[1] // self.factor**2, piece[0] * piece[1] // self.factor**2


def _round(length: float, step: int) -> int:
    """The nearest multiple, halves to the even one, and not 0."""
    return max(round(length / step) * step, step)


def slice_frames(size: tuple[int, int], slices: Slices) -> list[tuple[Frame, tuple[int, int]]]:
    """Where the whole and the slices, row by row, lie in a picture of `size`, and each one's own size."""
    grid, whole = slices.grid(size), slices.whole(size)
    found = [(Frame().resize(size[::-1], whole[::-1]), whole)]
    if grid is not None:
        (rows, columns), (height, width) = grid, slices.cut(size, grid)
        enlarged = Frame().resize(size[::-1], (columns * width, rows * height))
        found += [
            (enlarged.cut(column * width, row * height), (height, width))
            for row in range(rows)
            for column in range(columns)
        ]
    return found
