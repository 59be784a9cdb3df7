"""Images made ready: resized, cropped, padded and normalised as the checkpoint's settings say.

Source of the arithmetic: image_processing_backends.py and image_transforms.py of huggingface/transformers, Pillow path.
"""

from collections.abc import Mapping
from math import ceil, prod

import numpy as np
from PIL import Image

from mlx_vlm_mini.errors import CheckpointError, ImageError

from .anyres import Tiling, cut_frames
from .bars import Letterbox, pad_and_resize, pad_to_square
from .canvas import Canvas, canvas_frames
from .crops import Crops, crop_frames
from .frame import Frame
from .grid import PatchGrid
from .settings import _MOST_PIXELS, _MOST_SQUARE, ImageSettings
from .slices import Slices, slice_frames
from .splits import Splits, split_frames
from .tiles import Tiles, tile_frames


def preprocess(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """An RGB image as the vision tower takes it.

    Returns:
        float32[height, width, 3].
    """
    if isinstance(settings.tiling, PatchGrid):
        height, width = settings.tiling.fit((image.height, image.width))
        _check_pixels(image, width, height)
        image = image.resize((width, height), resample=Image.Resampling(settings.resample))
    elif isinstance(settings.tiling, Letterbox):
        image = settings.tiling.place(image, Image.Resampling(settings.resample))
    side = None if settings.pad_color is None else max(image.size)
    if side is not None:
        _check_pixels(image, side, side, _MOST_PIXELS if settings.size is None else _MOST_SQUARE)
    if settings.size is not None:
        target = _target_size(side or image.width, side or image.height, settings.size)
        if min(target) < 1:
            raise ImageError(f"an image of {image.width}x{image.height} pixels is too narrow for this model")
        if prod(_target_size(1, 1, settings.size)) > _MOST_PIXELS:  # of any image: then the settings are at fault
            raise CheckpointError(
                f"an image of {image.width}x{image.height} pixels cannot be made ready as the checkpoint's settings of "
                f"images say: it would become one of {target[0]}x{target[1]}"
            )
        _check_pixels(image, *target)
        kernel = Image.Resampling(settings.resample)
        if settings.pad_color is not None:
            image = pad_and_resize(image, settings.pad_color, target, kernel)
        else:
            image = image.resize(target, resample=kernel)
    elif settings.pad_color is not None:
        image = pad_to_square(image, settings.pad_color)
    array = np.asarray(image)
    if settings.crop_size is not None:
        array = _center_crop(array, *settings.crop_size)
    values = array.astype(np.float32)
    if settings.rescale_factor is not None:
        values *= np.float32(settings.rescale_factor)
    if settings.image_mean is not None and settings.image_std is not None:
        mean, std = np.array(settings.image_mean, np.float32), np.array(settings.image_std, np.float32)
        values = (values - mean) / std
    return values


def to_image(values: np.ndarray, settings: ImageSettings) -> Image.Image:
    """Normalised pixels, float32[height, width, 3], as an image: what `preprocess` does last, backwards. Fractions are
    cut off, as the reference does."""
    if settings.image_mean is not None and settings.image_std is not None:
        values = values * np.array(settings.image_std, np.float32) + np.array(settings.image_mean, np.float32)
    if settings.rescale_factor is not None:
        values = values * np.float32(1 / settings.rescale_factor)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def frames(size: tuple[int, int], settings: ImageSettings) -> list[Frame]:
    """Where each row of pixels that an image of `size`, height and width, is made into lies in it."""
    pieces = [(Frame(), size)]
    if isinstance(settings.tiling, Tiling):
        pieces = cut_frames(size, settings.tiling)
    elif isinstance(settings.tiling, Tiles):
        pieces = tile_frames(size, settings.tiling)
    elif isinstance(settings.tiling, Canvas):
        pieces = canvas_frames(size, settings.tiling)
    elif isinstance(settings.tiling, Splits):
        pieces = split_frames(size, settings.tiling)
    elif isinstance(settings.tiling, Crops):
        pieces = crop_frames(size, settings.tiling)
    elif isinstance(settings.tiling, Slices):
        pieces = slice_frames(size, settings.tiling)
    elif isinstance(settings.tiling, PatchGrid):
        fitted = settings.tiling.fit(size)
        pieces = [(Frame().resize(size[::-1], fitted[::-1]), fitted)]
    elif isinstance(settings.tiling, Letterbox):
        pieces = [(settings.tiling.frame(size), (settings.tiling.side,) * 2)]
    return [_frame(frame, height, width, settings) for frame, (height, width) in pieces]


def _frame(frame: Frame, height: int, width: int, settings: ImageSettings) -> Frame:
    """Where the pixels that `preprocess` makes of a piece lie, which lies at `frame`."""
    if settings.pad_color is not None:
        side = max(width, height)
        frame = frame.cut(-((side - width) // 2), -((side - height) // 2))
        width = height = side
    if settings.size is not None:
        target = _target_size(width, height, settings.size)
        frame = frame.resize((width, height), target)
        width, height = target
    if settings.crop_size is not None:
        rows, columns = settings.crop_size
        frame = frame.cut((width - columns) // 2, (height - rows) // 2)
    return frame


def _check_pixels(image: Image.Image, width: int, height: int, most: int = _MOST_PIXELS) -> None:
    """Raises ImageError where a step on the way to the model would need gigabytes: of a very long and narrow image."""
    if width * height > most:
        raise ImageError(
            f"an image of {image.width}x{image.height} pixels becomes one of {width}x{height} for this model, about "
            f"{width * height * 3 / 1e9:.1f} GB: crop it first"
        )


def _target_size(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Width and height in pixels after resizing. Fractions are cut off, as the reference does."""
    if "shortest_edge" in size and "longest_edge" in size:
        short, limit = size["shortest_edge"], size["longest_edge"]
        exact: float = short
        if max(width, height) / min(width, height) * short > limit:
            exact = limit * min(width, height) / max(width, height)
            short = round(exact)
        if min(width, height) == short:
            return width, height
        if width < height:
            return short, int(exact * height / width)
        return int(exact * width / height), short
    if "shortest_edge" in size:
        short = size["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)
    if "max_height" in size and "max_width" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(width * scale), int(height * scale)
    if "height" in size and "width" in size:
        return size["width"], size["height"]
    raise CheckpointError(
        f"preprocessor_config.json: cannot resize by {dict(size)}; height and width, or shortest_edge are needed"
    )


def _center_crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut height x width from the middle; what lies outside a smaller image is black."""
    rows, columns = array.shape[:2]
    if height * width > _MOST_PIXELS:
        raise CheckpointError(f"preprocessor_config.json: a crop of {width}x{height} pixels is too large")
    padded = np.zeros((max(height, rows), max(width, columns), 3), dtype=array.dtype)
    top, left = ceil((padded.shape[0] - rows) / 2), ceil((padded.shape[1] - columns) / 2)
    padded[top : top + rows, left : left + columns] = array
    top, left = (rows - height) // 2 + top, (columns - width) // 2 + left
    return padded[top : top + height, left : left + width]
