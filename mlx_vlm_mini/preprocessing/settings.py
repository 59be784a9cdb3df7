"""Images made ready: resized, cropped, padded and normalised as the checkpoint's settings say.

Source of the arithmetic: image_processing_backends.py and image_transforms.py of huggingface/transformers, Pillow path.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError

from .anyres import Tiling, read_pinpoints
from .bars import Letterbox
from .canvas import Canvas
from .crops import Crops
from .grid import BudgetGrid, EdgeGrid, FramesGrid, Grid, PatchGrid, RaisedGrid, edge_grid
from .slices import Slices
from .splits import Splits
from .tiles import PageTiles, Tiles

Cuts = Tiling | Tiles | Canvas | Splits | Crops | PatchGrid | Slices | Letterbox


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
    "MiniCPMV4_6": {
        **_CLIP_DEFAULTS, "do_center_crop": False, "crop_size": None, "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5), "max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14,
        "slice_mode": True, "downsample_mode": "16x", "use_image_id": True,
    },
    "Janus": {
        **_CLIP_DEFAULTS, "size": {"height": 384, "width": 384}, "do_center_crop": False, "crop_size": None,
        "do_pad": True, "min_size": 14,
    },
    "GraniteDocling": {
        **_CLIP_DEFAULTS, "size": {"height": 512, "width": 512}, "do_center_crop": False, "crop_size": None,
        "crop_to_patches": True, "min_patches": 1, "max_patches": 32, "use_thumbnail": True, "fine_route": False,
        "dense_max_patches": 0, "dense_max_scale": 0.0, "dense_min_aspect": 0.0, "dense_max_aspect": 0.0,
    },
    "InternVLChat": {  # no class of transformers: what the family's own code does, by the names of GotOcr2's settings
        **_CLIP_DEFAULTS, "size": {"height": 448, "width": 448}, "do_center_crop": False, "crop_size": None,
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD,
        "min_patches": 1, "max_patches": 12, "use_thumbnail": False,
    },
}  # fmt: skip
_DEFAULTS["SmolVLM"] = _DEFAULTS["Idefics3"]
_DEFAULTS["Gemma4"] = _DEFAULTS["Gemma4Unified"] = {
    **_CLIP_DEFAULTS, "size": None, "do_center_crop": False, "crop_size": None, "do_normalize": False,
    "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0),
    "patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280,
}  # fmt: skip
_DEFAULTS["Qwen2_5_VL"] = _DEFAULTS["Qwen2VL"]  # a name that its first files have
_DEFAULTS["PaddleOCRVL"] = {**_DEFAULTS["Qwen2VL"], "size": {"shortest_edge": 384**2, "longest_edge": 1536**2}}
_DEFAULTS["Glm4v"] = _DEFAULTS["Glm46V"] = {
    **_DEFAULTS["Qwen2VL"], "size": {"shortest_edge": 112**2, "longest_edge": 15000 * 28**2}, "temporal_patch_size": 2,
}  # fmt: skip
TILINGS: dict[str, type[Cuts]] = {
    "LlavaNext": Tiling, "LlavaOnevision": Tiling, "GotOcr2": Tiles, "InternVLChat": Tiles, "Mllama": Canvas,
    "Idefics3": Splits, "SmolVLM": Splits, "Gemma3": Crops, "Qwen2VL": Grid, "Qwen2_5_VL": Grid, "Pixtral": EdgeGrid,
    "PaddleOCRVL": RaisedGrid, "Glm4v": FramesGrid, "Glm46V": FramesGrid, "Gemma4": BudgetGrid,
    "Gemma4Unified": BudgetGrid, "GraniteDocling": PageTiles, "MiniCPMV4_6": Slices, "Janus": Letterbox,
}  # fmt: skip
"""Image processors that cut an image, or put it into a square, and how."""
_FIT = (Canvas, PatchGrid, Splits, Slices, Letterbox)  # which resize an image themselves


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
    resample = _as_filter(values["resample"])
    mean, std = (_as_channels(values[key], key) for key in ("image_mean", "image_std"))
    if 0 in std:
        raise CheckpointError("preprocessor_config.json: image_std must not be 0")
    normalize, padded = values["do_normalize"], kind in ("Llava", "InternVLChat") and values["do_pad"]
    if kind == "Mllama" and not (values["do_resize"] and values["do_pad"]):
        raise CheckpointError("preprocessor_config.json: a canvas of tiles needs do_resize and do_pad")
    if kind == "Janus" and not (values["do_resize"] and values["do_pad"]):
        raise CheckpointError("preprocessor_config.json: a picture in a square needs do_resize and do_pad")
    if issubclass(TILINGS.get(kind, object), (PatchGrid, Slices)) and not values["do_resize"]:
        raise CheckpointError("preprocessor_config.json: images in patches need do_resize")
    cuts: dict[str, Callable[[Mapping[str, Any]], Cuts]] = {
        "LlavaNext": _tiling,
        "LlavaOnevision": _tiling,
        "GotOcr2": _tiles,
        "InternVLChat": _tiles,
        "GraniteDocling": _page_tiles,
        "Mllama": _canvas,
        "Idefics3": _splits,
        "SmolVLM": _splits,
        "Gemma3": _crops,
        "Qwen2VL": _grid,
        "Qwen2_5_VL": _grid,
        "PaddleOCRVL": lambda values: RaisedGrid(**_grid_fields(values)),
        "Glm4v": _frames_grid,
        "Glm46V": _frames_grid,
        "Janus": lambda values: _letterbox(values, mean),
        "Gemma4": _budget_grid,
        "Gemma4Unified": _budget_grid,
        "Pixtral": lambda values: edge_grid(_as_size(values["size"], square=True), values),
        "MiniCPMV4_6": _slices,
    }
    settings = ImageSettings(
        size=_as_size(values["size"], square=False)
        if values["do_resize"] and not issubclass(TILINGS.get(kind, object), _FIT)
        else None,
        resample=resample,
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


def _tile_size(values: Mapping[str, Any], what: str = "tiles need") -> int:
    size = _as_size(values["size"], square=False)
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise CheckpointError(f"preprocessor_config.json: {what} as size equal height and width, not {dict(size)}")
    return size["height"]


def _letterbox(values: Mapping[str, Any], mean: tuple[float, ...]) -> Letterbox:
    """The bars have the mean colour, whatever `background_color` says, as in the reference."""
    side, least = _tile_size(values, "a square needs"), values["min_size"]
    if type(least) is not int or not 1 <= least <= side:
        raise CheckpointError(f"preprocessor_config.json: min_size must be from 1 to {side} pixels, not {least!r}")
    if side**2 > _MOST_PIXELS:
        raise CheckpointError(f"preprocessor_config.json: a square of {side} pixels a side is too large")
    return Letterbox(side=side, least=least, color=tuple(int(x * 255) for x in mean))


def _canvas(values: Mapping[str, Any]) -> Canvas:
    canvas = Canvas(tile_size=_tile_size(values), max_tiles=values["max_image_tiles"])
    if canvas.tile_size**2 * canvas.max_tiles > _MOST_PIXELS:
        raise CheckpointError(f"preprocessor_config.json: tiles of {canvas.tile_size} pixels a side are too large")
    return canvas


def _grid(values: Mapping[str, Any]) -> Grid:
    return Grid(**_grid_fields(values))


def _frames_grid(values: Mapping[str, Any]) -> FramesGrid:
    """A picture is all frames of a step."""
    frames = values["temporal_patch_size"]
    return FramesGrid(**_grid_fields(values), frames=frames, step=frames)


def _grid_fields(values: Mapping[str, Any]) -> dict[str, int]:
    """The limits, in pixels of an image, go by three names; the first that is there counts."""
    size, limits = values["size"], []
    if not isinstance(size, Mapping):
        raise CheckpointError(f"preprocessor_config.json: {size!r} names no limits of pixels")
    for key, edge, default in (("min_pixels", "shortest_edge", 56**2), ("max_pixels", "longest_edge", 1280 * 28**2)):
        named = (values[key], size.get(edge), size.get(key))
        limits.append(next((value for value in named if value is not None), default))
    patches = {"patch_size": values["patch_size"], "merge": values["merge_size"]}
    return {**patches, "min_pixels": limits[0], "max_pixels": limits[1]}


def _budget_grid(values: Mapping[str, Any]) -> BudgetGrid:
    return BudgetGrid(
        patch_size=values["patch_size"], merge=values["pooling_kernel_size"], tokens=values["max_soft_tokens"]
    )


def _tiles(values: Mapping[str, Any]) -> Tiles:
    """`crop_to_patches` is not read: transformers' InternVL turns it on, whatever a file says."""
    return Tiles(**_tile_fields(values))


def _tile_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tile_size": _tile_size(values), "min_tiles": values["min_patches"], "max_tiles": values["max_patches"],
        "thumbnail": bool(values["use_thumbnail"]),
    }  # fmt: skip


def _page_tiles(values: Mapping[str, Any]) -> PageTiles:
    cut = {} if values["crop_to_patches"] else {"min_patches": 1, "max_patches": 1}
    scale, least, most = (
        _as_number(values[key], key) for key in ("dense_max_scale", "dense_min_aspect", "dense_max_aspect")
    )
    return PageTiles(
        **_tile_fields({**values, **cut, "use_thumbnail": True}),
        fine=bool(values["fine_route"]),
        dense_tiles=values["dense_max_patches"] if values["crop_to_patches"] else 0,
        dense_scale=scale,
        dense_aspects=(least, most),
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


def _slices(values: Mapping[str, Any]) -> Slices:
    if values["downsample_mode"] != "16x":
        raise CheckpointError(
            f"preprocessor_config.json: downsample_mode must be 16x, one token of 4 x 4 patches, not "
            f"{values['downsample_mode']!r}"
        )
    return Slices(
        patch_size=values["patch_size"],
        merge=4,
        scale=values["scale_resolution"],
        max_tiles=values["max_slice_nums"] if values["slice_mode"] else 1,
        numbered=bool(values["use_image_id"]),
    )


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


def _as_filter(value: Any) -> int:
    """Pillow's number of a filter that goes by its number or its name ("bicubic")."""
    if isinstance(value, str):
        value = {filter.name.lower(): filter for filter in Image.Resampling}.get(value.strip().lower(), value)
    if isinstance(value, bool) or value not in list(Image.Resampling):
        raise CheckpointError(f"preprocessor_config.json: resample {value!r} is none of Pillow's filters")
    return int(value)


def _as_number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise CheckpointError(f"preprocessor_config.json: {name} must be a number, not {value!r}")
    return value


def _as_channels(value: Any, name: str) -> tuple[float, ...]:
    channels = value if isinstance(value, list | tuple) else (value,) * 3
    if len(channels) != 3:
        raise CheckpointError(f"preprocessor_config.json: {name} has 3 channels, not {len(channels)}")
    return tuple(_as_number(channel, name) for channel in channels)
