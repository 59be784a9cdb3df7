"""Bars that make an image square: LLaVA's `pad` before it is resized, Janus's after."""

from dataclasses import dataclass

from PIL import Image

from .frame import Frame

_BAND = 1 << 22  # pixels that are resized at a time


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pad_and_resize(
    image: Image.Image, color: tuple[int, ...], target: tuple[int, int], kernel: Image.Resampling
) -> Image.Image:
    """`pad_to_square`, then resized to `target`, without the square, which is large where an image is long and narrow.

    Pillow resizes first every row, then every column, and rows of one colour keep it: so the image's own rows are
    resized a band at a time. The pixels are the same.
    """
    side, width = max(image.size), target[0]
    left, top, rows = (side - image.width) // 2, (side - image.height) // 2, max(_BAND // side, 1)
    narrow = Image.new("RGB", (width, side), color)
    for begin in range(0, image.height, rows):
        band = Image.new("RGB", (side, min(rows, image.height - begin)), color)
        band.paste(image.crop((0, begin, image.width, begin + band.height)), (left, 0))
        narrow.paste(band.resize((width, band.height), resample=kernel), (0, top + begin))
    return narrow.resize(target, resample=kernel)


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """An image in its shape inside a square of `side` pixels, neither of its sides below `least` pixels (Janus)."""

    side: int
    least: int
    color: tuple[int, ...]

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width inside the square of an image of `size`; halves become even."""
        scale = self.side / max(size)
        height, width = (max(round(edge * scale), self.least) for edge in size)
        return height, width

    def place(self, image: Image.Image, kernel: Image.Resampling) -> Image.Image:
        """The image resized, in the middle of its square."""
        height, width = self.fit((image.height, image.width))
        return pad_to_square(image.resize((width, height), resample=kernel), self.color)

    def frame(self, size: tuple[int, int]) -> Frame:
        """Where the square's pixels lie in an image of `size`, height and width."""
        height, width = self.fit(size)
        left, top = (self.side - width) // 2, (self.side - height) // 2
        return Frame().resize(size[::-1], (width, height)).cut(-left, -top)
