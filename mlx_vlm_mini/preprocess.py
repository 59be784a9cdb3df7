"""Images made ready: resized, cropped, padded and normalised as the checkpoint's settings say.

Source of the arithmetic: image_processing_backends.py and image_transforms.py of huggingface/transformers, Pillow path.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np
from PIL import Image

from .anyres import Tiling, cut_frames, read_pinpoints
from .bars import pad_and_resize, pad_to_square
from .canvas import Canvas, canvas_frames
from .crops import Crops, crop_frames
from .errors import CheckpointError, ImageError
from .grid import EdgeGrid, Grid, PatchGrid, edge_grid
from .places import Frame
from .splits import Splits, split_frames
from .tiles import Tiles, tile_frames

Cuts = Tiling | Tiles | Canvas | Splits | Crops | PatchGrid


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How a checkpoint prepares its images, from preprocessor_config.json or processor_config.json."""

    size: Mapping[str, int] | None
    """Target in pixels, by Hugging Face's keys: `height` and `width`, or `shortest_edge`, ...; None: not resized."""
    resample: int
    """Pillow's filter number: 1 Lanczos, 2 bilinear, 3 bicubic."""
    crop_size: tuple[int, int] | None
    """Height and width of the centre crop; None: not cropped."""
    pad_color: tuple[int, ...] | None
    """Colour of the bars that first make the image square (LLaVA's `pad`); None: not padded."""
    rescale_factor: float | None
    image_mean: tuple[float, ...] | None
    image_std: tuple[float, ...] | None
    tiling: Cuts | None
    """How an image is cut first, what stands above then being done to each piece; None: it stays whole."""
    among: "ImageSettings | None" = None
    """How an image is prepared that is not the conversation's only one (LLaVA-OneVision); None: no differently."""


_MOST_PIXELS = 1 << 26  # of a step on the way to a model: far above all that they ask for
_MOST_SQUARE = 1 << 28  # pixels of an image made square that is shrunk at once, a band at a time
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_DEFAULTS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_pad": False,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": _OPENAI_MEAN, "image_std": _OPENAI_STD,
}  # fmt: skip
LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LLAVA_ONEVISION_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP_DEFAULTS,
    "Llava": _CLIP_DEFAULTS,
    "LlavaNext": {
        **_CLIP_DEFAULTS, "image_grid_pinpoints": LLAVA_NEXT_PINPOINTS},
    "LlavaOnevision": {
        **_CLIP_DEFAULTS, "size": {"height": 384, "width": 384}, "do_center_crop": False, "crop_size": None,
        "image_grid_pinpoints": LLAVA_ONEVISION_PINPOINTS},
    "Blip": {
        **_CLIP_DEFAULTS, "size": {"height": 384, "width": 384}, "do_center_crop": False, "crop_size": None},
    "Siglip": {
        **_CLIP_DEFAULTS, "size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": None,
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
    },
    "GotOcr2": {
        **_CLIP_DEFAULTS, "size": {"height": 384, "width": 384}, "do_center_crop": False, "crop_size": None,
        "min_patches": 1, "max_patches": 12, "use_thumbnail": True,
    },
    "Mllama": {
        **_CLIP_DEFAULTS, "size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": None,
        "resample": 2, "do_pad": True, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
        "max_image_tiles": 4,
    },
    "Idefics3": {
        **_CLIP_DEFAULTS, "size": {"longest_edge": 1456}, "do_center_crop": False, "crop_size": None, "resample": 1,
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
        "max_image_size": {"longest_edge": 364}, "do_image_splitting": True,
    },
    "Gemma3": {
        **_CLIP_DEFAULTS, "size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": None,
        "resample": 2, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    "Qwen2VL": {
        **_CLIP_DEFAULTS, "size": {}, "do_center_crop": False, "crop_size": None,
        "min_pixels": None, "max_pixels": None, "patch_size": 14, "merge_size": 2,
    },
    "Pixtral": {
        **_CLIP_DEFAULTS, "size": {"longest_edge": 1024}, "do_center_crop": False, "crop_size": None,
        "patch_size": 16, "merge_size": 1,
    },
    "InternVLChat": {  # no class of transformers: what the family's own code does, by the names of GotOcr2's settings
        **_CLIP_DEFAULTS, "size": {"height": 448, "width": 448}, "do_center_crop": False, "crop_size": None,
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD,
        "min_patches": 1, "max_patches": 12, "use_thumbnail": False,
    },
}  # fmt: skip
_DEFAULTS["SmolVLM"] = _DEFAULTS["Idefics3"]
_DEFAULTS["Qwen2_5_VL"] = _DEFAULTS["Qwen2VL"]  # a name that its first files have
TILINGS: dict[str, type[Cuts]] = {
    "LlavaNext": Tiling, "LlavaOnevision": Tiling, "GotOcr2": Tiles, "InternVLChat": Tiles, "Mllama": Canvas,
    "Idefics3": Splits, "SmolVLM": Splits, "Gemma3": Crops, "Qwen2VL": Grid, "Qwen2_5_VL": Grid, "Pixtral": EdgeGrid,
}  # fmt: skip
"""Image processors that cut an image, and how."""
_FIT = (Canvas, Grid, EdgeGrid, Splits)  # which resize an image themselves


def image_settings(hf: Mapping[str, Any], default_type: str) -> ImageSettings:
    """Read the settings of an image processor, completed with its class's defaults.

    Args:
        hf: preprocessor_config.json, or the `image_processor` part of processor_config.json.
        default_type: the class to assume where the file names none, e.g. "Llava".

    Raises:
        CheckpointError: the class is unknown or a value is not usable.
    """
    name = hf.get("image_processor_type") or hf.get("feature_extractor_type") or default_type
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    if kind not in _DEFAULTS:
        known = ", ".join(f"{key}ImageProcessor" for key in sorted(_DEFAULTS))
        raise CheckpointError(f"preprocessor_config.json: unknown image processor '{name}' (known: {known})")
    # A flag that is null means off, another value that is null its default, as in the reference.
    given = {key: value or False if key.startswith("do_") else value for key, value in hf.items()}
    values = {**_DEFAULTS[kind], **{key: value for key, value in given.items() if value is not None}}
    for key in ("do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize"):
        if not isinstance(values[key], bool):
            raise CheckpointError(f"preprocessor_config.json: {key} must be true or false, not {values[key]!r}")
    crop = _as_size(values["crop_size"], square=True) if values["do_center_crop"] else None
    if crop is not None and not {"height", "width"} <= crop.keys():
        raise CheckpointError(f"preprocessor_config.json: crop_size needs height and width, not {dict(crop)}")
    if values["resample"] not in list(Image.Resampling):
        raise CheckpointError(f"preprocessor_config.json: resample {values['resample']} is none of Pillow's filters")
    mean, std = (_as_channels(values[key], key) for key in ("image_mean", "image_std"))
    if 0 in std:
        raise CheckpointError("preprocessor_config.json: image_std must not be 0")
    normalize, padded = values["do_normalize"], kind in ("Llava", "InternVLChat") and values["do_pad"]
    if kind == "Mllama" and not (values["do_resize"] and values["do_pad"]):
        raise CheckpointError("preprocessor_config.json: a canvas of tiles needs do_resize and do_pad")
    if TILINGS.get(kind) in (Grid, EdgeGrid) and not values["do_resize"]:
        raise CheckpointError("preprocessor_config.json: images in patches need do_resize")
    cuts: dict[str, Callable[[Mapping[str, Any]], Cuts]] = {
        "LlavaNext": _tiling,
        "LlavaOnevision": _tiling,
        "GotOcr2": _tiles,
        "InternVLChat": _tiles,
        "Mllama": _canvas,
        "Idefics3": _splits,
        "SmolVLM": _splits,
        "Gemma3": _crops,
        "Qwen2VL": _grid,
        "Qwen2_5_VL": _grid,
        "Pixtral": lambda values: edge_grid(_as_size(values["size"], square=True), values),
    }
    settings = ImageSettings(
        size=_as_size(values["size"], square=False) if values["do_resize"] and TILINGS.get(kind) not in _FIT else None,
        resample=values["resample"],
        crop_size=(crop["height"], crop["width"]) if crop is not None else None,
        pad_color=tuple(int(x * 255) for x in mean) if padded else None,
        rescale_factor=_as_number(values["rescale_factor"], "rescale_factor") if values["do_rescale"] else None,
        image_mean=mean if normalize else None,
        image_std=std if normalize else None,
        tiling=cuts[kind](values) if kind in cuts else None,
    )
    if kind == "LlavaOnevision":
        return replace(settings, among=replace(settings, tiling=None, pad_color=tuple(int(x * 255) for x in mean)))
    return settings


def _tiling(values: Mapping[str, Any]) -> Tiling:
    """The tiles have the size of the crop, whether or not one is made, as in the reference; without one the image's."""
    size = _as_size(values["size"], square=False)
    short = size.get("shortest_edge")
    base = size.get("height", short), size.get("width", short)
    crop = size if values["crop_size"] is None else _as_size(values["crop_size"], square=True)
    tile_size = base[0] if values["crop_size"] is None else crop.get("height")
    if base[0] is None or base[1] is None or tile_size is None:
        raise CheckpointError(
            "preprocessor_config.json: tiles need crop_size as height and width, and size as height and width or "
            f"shortest_edge, not {dict(crop)} and {dict(size)}"
        )
    pinpoints = read_pinpoints(values["image_grid_pinpoints"], tile_size, "preprocessor_config.json")
    return Tiling(pinpoints=pinpoints, tile_size=tile_size, base_size=(base[0], base[1]))


def _tile_size(values: Mapping[str, Any]) -> int:
    size = _as_size(values["size"], square=False)
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise CheckpointError(f"preprocessor_config.json: tiles need as size equal height and width, not {dict(size)}")
    return size["height"]


def _canvas(values: Mapping[str, Any]) -> Canvas:
    canvas = Canvas(tile_size=_tile_size(values), max_tiles=values["max_image_tiles"])
    if canvas.tile_size**2 * canvas.max_tiles > _MOST_PIXELS:
        raise CheckpointError(f"preprocessor_config.json: tiles of {canvas.tile_size} pixels a side are too large")
    return canvas


def _grid(values: Mapping[str, Any]) -> Grid:
    """The limits, in pixels of an image, go by three names; the first that is there counts."""
    size, limits = values["size"], []
    if not isinstance(size, Mapping):
        raise CheckpointError(f"preprocessor_config.json: {size!r} names no limits of pixels")
    for key, edge, default in (("min_pixels", "shortest_edge", 56**2), ("max_pixels", "longest_edge", 1280 * 28**2)):
        named = (values[key], size.get(edge), size.get(key))
        limits.append(next((value for value in named if value is not None), default))
    return Grid(patch_size=values["patch_size"], merge=values["merge_size"], min_pixels=limits[0], max_pixels=limits[1])


def _tiles(values: Mapping[str, Any]) -> Tiles:
    """`crop_to_patches` is not read: transformers' InternVL turns it on, whatever a file says."""
    return Tiles(
        tile_size=_tile_size(values),
        min_tiles=values["min_patches"],
        max_tiles=values["max_patches"],
        thumbnail=bool(values["use_thumbnail"]),
    )


def _splits(values: Mapping[str, Any]) -> Splits:
    longest, tile = (_as_size(values[key], square=False).get("longest_edge") for key in ("size", "max_image_size"))
    if tile is None or (longest is None and values["do_resize"]):
        raise CheckpointError(
            "preprocessor_config.json: split images need size and max_image_size as longest_edge, not "
            f"{values['size']!r} and {values['max_image_size']!r}"
        )
    if tile**2 > _MOST_PIXELS:
        raise CheckpointError(f"preprocessor_config.json: tiles of {tile} pixels a side are too large")
    split = bool(values["do_image_splitting"])
    return Splits(tile_size=tile, longest_edge=longest if values["do_resize"] else None, split=split)


def _crops(values: Mapping[str, Any]) -> Crops:
    return Crops(
        min_size=values["pan_and_scan_min_crop_size"],
        min_ratio=_as_number(values["pan_and_scan_min_ratio_to_activate"], "pan_and_scan_min_ratio_to_activate"),
        max_crops=values["pan_and_scan_max_num_crops"] if values["do_pan_and_scan"] else 1,
    )


def _as_size(size: Any, *, square: bool) -> Mapping[str, int]:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if given and all(isinstance(value, int) and value is not True and value > 0 for value in given.values()):
            return given
    raise CheckpointError(f"preprocessor_config.json: {size!r} is not an image size in pixels")


def _as_number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise CheckpointError(f"preprocessor_config.json: {name} must be a number, not {value!r}")
    return value


def _as_channels(value: Any, name: str) -> tuple[float, ...]:
    channels = value if isinstance(value, list | tuple) else (value,) * 3
    if len(channels) != 3:
        raise CheckpointError(f"preprocessor_config.json: {name} has 3 channels, not {len(channels)}")
    return tuple(_as_number(channel, name) for channel in channels)


def preprocess(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """An RGB image as the vision tower takes it.

    Returns:
        float32[height, width, 3].
    """
    if isinstance(settings.tiling, PatchGrid):
        height, width = settings.tiling.fit((image.height, image.width))
        _check_pixels(image, width, height)
        image = image.resize((width, height), resample=Image.Resampling(settings.resample))
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
    elif isinstance(settings.tiling, PatchGrid):
        fitted = settings.tiling.fit(size)
        pieces = [(Frame().resize(size[::-1], fitted[::-1]), fitted)]
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
