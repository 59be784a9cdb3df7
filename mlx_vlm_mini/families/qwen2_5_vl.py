"""Qwen2.5-VL: Qwen2-VL with a tower most of whose blocks see windows, with RMS norms and gated MLPs.

Sources: arXiv:2502.13923; models/qwen2_5_vl of huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import side
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import (
    IMAGE_PROCESSOR,
    VIDEO_TOKEN,
    grid_model,
    grid_weights,
    image_text,
    pixels,
    sectioned_decoder,
    video_layout,
)

from .qwen2_vl import CHAT_TEMPLATE, MERGER, PROMPT_LANGUAGE, SECTIONS, TEXT, VIDEO_PROCESSOR

__all__ = [
    "ANSWERS_IN_PIXELS", "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "PROMPT_LANGUAGE", "VIDEO_PROCESSOR", "VIDEO_TOKEN",
    "WEIGHTS", "config", "image_text", "pixels", "video_layout",
]  # fmt: skip

WEIGHTS: Weights = grid_weights({name: name for name in ("gate_proj", "up_proj", "down_proj")}, MERGER)

ANSWERS_IN_PIXELS = True
"""Boxes and points are those of the resized image."""

_VISION = {
    "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "out_hidden_size": 3584, "fullatt_block_indexes": (7, 15, 23, 31), "tokens_per_second": 4,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    decoder = sectioned_decoder(hf, "qwen2", TEXT, SECTIONS, interleaved=False)
    values = {**_VISION, **(hf.get("vision_config") or {})}
    merge = values["spatial_merge_size"]
    window = values["window_size"] // merge // side(values["patch_size"], "patch_size") * merge
    if window < 1:
        raise CheckpointError(f"config.json: a window of {values['window_size']} pixels holds no token")
    return grid_model(
        hf,
        decoder,
        "qwen2_5_vl",
        {**values, "width": values["hidden_size"], "out": values["out_hidden_size"]},
        norm_type="rms_norm",
        gated_mlp=True,
        window=window,
        full_blocks=tuple(values["fullatt_block_indexes"]),
        tokens_per_second=values["tokens_per_second"],
    )
