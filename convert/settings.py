"""What a conversion is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_vlm_mini.checkpoints.load import DTypeName
from mlx_vlm_mini.errors import CheckpointError

from .quantize import Mode, Part
from .recipe import METHODS, RECIPES, Method, Recipe


@dataclass(frozen=True)
class Settings:
    """What a conversion is asked for.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8, of the decoder's linear layers, embeddings and head; None quantizes nothing.
        group_size: weights that share a scale: 32, 64 or 128.
        mode: "affine", or "mxfp4", "mxfp8", "nvfp4", which have bits and groups of their own.
        part_bits: bits of single parts: vision, projector, decoder, embeddings, head.
        dtype: type of what stays in floating point; by default as it is.
        dequantize: bring what the source holds quantized to floating point, where nothing else is asked for.
        allow_nan: convert tensors with NaN or infinity, too.
        recipe: "uniform"; "mixed" gives more than `bits` to some layers; "auto" chooses the bits of every layer that
            `part_bits` does not name.
        bits_per_weight: what "auto" may spend, over the whole model.
        method: "round", or "gptq", which makes up for each weight's error in others.
        calibration: a JSONL file of conversations or a folder of pictures to measure with; by default drawn scenes.
    """

    bits: int | None = None
    group_size: int = 64
    mode: Mode = "affine"
    part_bits: Mapping[Part, int | None] | None = None
    dtype: DTypeName | None = None
    dequantize: bool = False
    allow_nan: bool = False
    recipe: Recipe = "uniform"
    bits_per_weight: float | None = None
    method: Method = "round"
    calibration: str | None = None

    def __post_init__(self) -> None:
        auto, calibrated = self.recipe == "auto", self.recipe == "auto" or self.method == "gptq"
        for wrong, message in (
            (self.recipe not in RECIPES, f"recipes are {', '.join(RECIPES)}, not {self.recipe}"),
            (self.method not in METHODS, f"methods are {', '.join(METHODS)}, not {self.method}"),
            (auto and self.bits_per_weight is None, "recipe auto needs a budget: give bits per weight"),
            (not auto and self.bits_per_weight is not None, "only recipe auto takes a budget in bits per weight"),
            (auto and self.bits is not None, "recipe auto chooses the bits itself: leave them out"),
            (self.recipe == "mixed" and self.bits is None, "recipe mixed needs bits, to give some layers more"),
            (self.mode != "affine" and (calibrated or self.recipe == "mixed"),
             f"mode {self.mode} goes with recipe uniform and method round only"),
            (self.calibration is not None and not calibrated,
             "calibration serves recipe auto and method gptq only"),
            (self.dequantize and calibrated, "what is dequantized needs no recipe"),
        ):  # fmt: skip
            if wrong:
                raise CheckpointError(message)

    @property
    def is_calibrated(self) -> bool:
        return self.recipe == "auto" or self.method == "gptq"
