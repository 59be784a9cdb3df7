"""Pan and scan: the whole image, and where it is much longer than wide, or wider than long, a row of crops behind it.

Source: Gemma 3 (arXiv:2503.19786); models/gemma3 of huggingface/transformers.
"""

from dataclasses import dataclass
from math import ceil, floor

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError

from .frame import Frame

_MOST = 1000  # crops, far above every model's 4


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How an image processor crops."""

    min_size: int
    """Pixels along a crop's shorter side at least; with smaller crops there is none."""
    min_ratio: float
    """Of the longer side to the shorter one, from which on there are crops."""
    max_crops: int
    """1: there are none."""

    def __post_init__(self) -> None:
        if type(self.max_crops) is not int or not 1 <= self.max_crops <= _MOST:
            raise CheckpointError(f"an image is cut into a whole number of crops, 1 to {_MOST}, not {self.max_crops!r}")
        if type(self.min_size) is not int or self.min_size < 1 or not self.min_ratio > 0:
            raise CheckpointError(
                "preprocessor_config.json: pan and scan needs positive numbers as pan_and_scan_min_crop_size and "
                "pan_and_scan_min_ratio_to_activate"
            )


def crop_boxes(size: tuple[int, int], crops: Crops) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each crop of an image of `size`, height and width; there may be none."""
    height, width = size
    long, short = max(size), min(size)
    if crops.max_crops == 1 or long / short < crops.min_ratio:
        return []
    count = min(max(2, min(long // crops.min_size, floor(long / short + 0.5))), crops.max_crops)
    step = ceil(long / count)
    if min(step, short) < crops.min_size:
        return []
    spans = [(i * step, min((i + 1) * step, long)) for i in range(count)]
    return [(low, 0, high, height) if width >= height else (0, low, width, high) for low, high in spans]


def cut_crops(image: Image.Image, crops: Crops) -> list[Image.Image]:
    """The whole image, then its crops."""
    return [image, *(image.crop(box) for box in crop_boxes((image.height, image.width), crops))]


def crop_frames(size: tuple[int, int], crops: Crops) -> list[tuple[Frame, tuple[int, int]]]:
    """Where what `cut_crops` gives lies in an image of `size`, and each one's own size: height and width."""
    boxes = [(0, 0, size[1], size[0]), *crop_boxes(size, crops)]
    return [(Frame().cut(left, top), (bottom - top, right - left)) for left, top, right, bottom in boxes]
