"""Images of any size as grids of patches: sides of whole squares of patches, within limits.

Source: smart_resize in models/qwen2_vl, paddleocr_vl and glm4v, get_resize_output_image_size in models/pixtral,
get_aspect_ratio_preserving_size in models/gemma4 of huggingface/transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil, floor, sqrt
from typing import Any, ClassVar, Self

from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError

_LONGEST = 200  # times the shorter side


@dataclass(frozen=True, kw_only=True)
class PatchGrid(ABC):
    """How an image processor makes a grid."""

    patch_size: int
    merge: int
    """Patches along a side of what becomes one token."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise CheckpointError(f"images in patches need a whole number above 0 as {field.name}, not {value!r}")

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.patch_size * self.merge

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens of the largest image; of a very long and narrow one a few more may come."""

    @abstractmethod
    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what an image of `size`, height and width, becomes.

        Raises:
            ImageError: it is too long and narrow.
        """

    def limit_tokens(self, most: int) -> Self:
        """The same, of whose tokens an image has so many at most.

        Raises:
            PromptError: this grid has no such limit, or not this one.
        """
        raise PromptError("images of this model have no limit of tokens: leave image_tokens out")

    def count_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of `size`, height and width in pixels.

        Raises:
            ImageError: as `fit`.
        """
        height, width = self.fit(size)
        return (height // self.factor) * (width // self.factor)


@dataclass(frozen=True, kw_only=True)
class Grid(PatchGrid):
    """Sides rounded to whole tokens; `min_pixels` and `max_pixels` bound height times width (Qwen2-VL)."""

    min_pixels: int
    max_pixels: int
    _MOST_TOKENS: ClassVar[int] = 1 << 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(
                f"an image cannot have {self.min_pixels} pixels at least and {self.max_pixels} at most"
            )

    @property
    def max_tokens(self) -> int:
        return max(self.of_one(self.max_pixels) // self.factor**2, 1)

    def of_one(self, pixels: int) -> int:
        """How many of a limit's pixels one picture may have."""
        return pixels

    def limit(self, fewest: int | None, most: int | None) -> Self:
        """The same with other limits of a picture's height times width; None leaves one as it is."""
        return replace(
            self,
            min_pixels=self.min_pixels if fewest is None else fewest,
            max_pixels=self.max_pixels if most is None else most,
        )

    def limit_tokens(self, most: int) -> Self:
        """See `PatchGrid.limit_tokens`: of a very long and narrow image a few more may come."""
        pixels = min(most, self._MOST_TOKENS) * self.factor**2
        return self.limit(min(self.of_one(self.min_pixels), pixels), pixels)

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Halves round to the even number. An image below the limit gets sides rounded up, one above it down."""
        return self._fit(size, 1, 1)

    def _fit(self, size: tuple[int, int], frames: int, counted: int) -> tuple[int, int]:
        """`frames` pictures of one size, of which the limits count so many when their sides are whole tokens."""
        if max(size) / min(size) > _LONGEST:
            raise ImageError(
                f"an image of {size[1]}x{size[0]} pixels is too long and narrow: at most {_LONGEST} times as long as "
                "wide, crop it first"
            )
        height, width = (round(side / self.factor) * self.factor for side in size)
        if counted * height * width > self.max_pixels:
            shrink = sqrt(frames * size[0] * size[1] / self.max_pixels)
            height, width = (max(self.factor, floor(side / shrink / self.factor) * self.factor) for side in size)
        elif counted * height * width < self.min_pixels:
            grow = sqrt(self.min_pixels / (frames * size[0] * size[1]))
            height, width = (ceil(side * grow / self.factor) * self.factor for side in size)
        return height, width


BUDGETS = (70, 140, 280, 560, 1120)
"""Tokens of an image at most, those that Gemma 4 was trained with."""


@dataclass(frozen=True, kw_only=True)
class BudgetGrid(PatchGrid):
    """Sides rounded down to whole tokens, of an image as large as its budget of tokens allows (Gemma 4)."""

    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens not in BUDGETS:
            raise CheckpointError(
                f"an image has {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]} tokens at most, not {self.tokens}"
            )

    @property
    def max_tokens(self) -> int:
        return self.tokens

    def limit_tokens(self, most: int) -> Self:
        """See `PatchGrid.limit_tokens`: one of the budgets."""
        try:
            return replace(self, tokens=most)
        except CheckpointError as error:
            raise PromptError(f"{error} (image_tokens)") from None

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Small images are enlarged. A side of which nothing is left becomes one token long."""
        grow = sqrt(self.tokens * self.factor**2 / (size[0] * size[1]))
        height, width = (floor(grow * side / self.factor) for side in size)
        if not height:
            height, width = 1, min(floor(size[1] / size[0]), self.tokens)
        elif not width:
            height, width = min(floor(size[0] / size[1]), self.tokens), 1
        return height * self.factor, width * self.factor


@dataclass(frozen=True, kw_only=True)
class RaisedGrid(Grid):
    """Of an image with a side below a token's, that side is first made as long, in shape (PaddleOCR-VL)."""

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        if height < self.factor:
            height, width = self.factor, round(width * self.factor / height)
        if width < self.factor:
            height, width = round(height * self.factor / width), self.factor
        return super().fit((height, width))


@dataclass(frozen=True, kw_only=True)
class FramesGrid(Grid):
    """The limits are those of all frames of a video together, of which a picture is one step (Qwen3-VL, GLM-4V)."""

    frames: int
    step: int
    """Frames that become one step of time."""

    def of_one(self, pixels: int) -> int:
        return pixels // self.frames

    def limit(self, fewest: int | None, most: int | None) -> Self:
        """See `Grid.limit`."""
        return super().limit(*(None if pixels is None else pixels * self.frames for pixels in (fewest, most)))

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """An image with a side below a token's is first enlarged, in shape and without fractions."""
        if min(size) < self.factor:
            scale = max(self.factor / side for side in size)
            size = int(size[0] * scale), int(size[1] * scale)
        return self._fit(size, self.frames, round(self.frames / self.step) * self.step)


@dataclass(frozen=True, kw_only=True)
class EdgeGrid(PatchGrid):
    """Sides rounded up to whole tokens, of an image that is first shrunk into a frame, and never enlarged (Pixtral)."""

    max_height: int
    max_width: int
    step: int | None = None
    """Pixels to multiples of which sides are rounded up, where these are no whole tokens (LightOnOCR): what is left
    over goes through the tower and into no token."""

    @property
    def max_tokens(self) -> int:
        down, across = (self._up(side) // self.factor for side in (self.max_height, self.max_width))
        return down * across

    def _up(self, side: int) -> int:
        step = self.step or self.factor
        return ceil(side / step) * step

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The shrunken sides lose their fractions before they are rounded up, as in the reference."""
        height, width = size
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            height, width = floor(height / ratio), floor(width / ratio)
        if min(height, width) < 1:
            raise ImageError(
                f"an image of {size[1]}x{size[0]} pixels is too long and narrow for one of {self.max_width}x"
                f"{self.max_height}: crop it first"
            )
        height, width = self._up(height), self._up(width)
        if min(height, width) < self.factor:
            raise ImageError(
                f"an image of {size[1]}x{size[0]} pixels becomes one of {width}x{height}, of which a token would show "
                f"{self.factor}x{self.factor}: take a larger one"
            )
        return height, width


def edge_grid(size: Mapping[str, int], values: Mapping[str, Any]) -> EdgeGrid:
    """The grid of an image processor's settings.

    Raises:
        CheckpointError: `size` has neither `longest_edge` nor `height` and `width`.
    """
    frame = [size.get("longest_edge", size.get(key, 0)) for key in ("height", "width")]
    if 0 in frame:
        raise CheckpointError(f"preprocessor_config.json: {dict(size)} names no longest_edge")
    patches = {"patch_size": values["patch_size"], "merge": values["merge_size"], "step": values.get("step")}
    return EdgeGrid(**patches, max_height=frame[0], max_width=frame[1])
