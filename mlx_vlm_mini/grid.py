"""Images of any size as grids of patches: sides rounded to whole squares of patches, pixels within limits.

Source: smart_resize in models/qwen2_vl of huggingface/transformers.
"""

from dataclasses import dataclass
from math import ceil, floor, sqrt

from .errors import CheckpointError, ImageError

_LONGEST = 200  # times the shorter side


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How an image processor makes a grid; `min_pixels` and `max_pixels` bound height times width."""

    patch_size: int
    merge: int
    """Patches along a side of what becomes one token."""
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise CheckpointError(f"images in patches need a whole number above 0 as {name}, not {value!r}")
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(
                f"an image cannot have {self.min_pixels} pixels at least and {self.max_pixels} at most"
            )

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.patch_size * self.merge

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest image; a very long and narrow one may have a few more."""
        return max(self.max_pixels // self.factor**2, 1)

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what an image of `size`, height and width, becomes.

        Halves round to the even number. An image below the limit gets sides rounded up, one above it down.

        Raises:
            ImageError: it is too long and narrow.
        """
        if max(size) / min(size) > _LONGEST:
            raise ImageError(
                f"an image of {size[1]}x{size[0]} pixels is too long and narrow: at most {_LONGEST} times as long as "
                "wide, crop it first"
            )
        height, width = (round(side / self.factor) * self.factor for side in size)
        if height * width > self.max_pixels:
            shrink = sqrt(size[0] * size[1] / self.max_pixels)
            height, width = (max(self.factor, floor(side / shrink / self.factor) * self.factor) for side in size)
        elif height * width < self.min_pixels:
            grow = sqrt(self.min_pixels / (size[0] * size[1]))
            height, width = (ceil(side * grow / self.factor) * self.factor for side in size)
        return height, width

    def count_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of `size`, height and width in pixels.

        Raises:
            ImageError: as `fit`.
        """
        height, width = self.fit(size)
        return (height // self.factor) * (width // self.factor)
