"""Qwen3.5: Qwen3-VL's tower without taps, and a decoder three quarters of whose layers are gated delta nets.

Source: models/qwen3_5 of huggingface/transformers. A layer that drafts tokens ahead, which the Hub's files have beside
the model (`mtp`), is not read. What the template opens an answer with, `<think>` say, is what the checkpoint's own
does by default.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from mlx_vlm_mini.config import DecoderConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.hybrid import QWEN3_5, hybrid_decoder, hybrid_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import (
    IMAGE_PROCESSOR,
    VIDEO_TOKEN,
    chat_template,
    grid_model,
    image_text,
    pixels,
)
from mlx_vlm_mini.families.qwen3_vl import VIDEO_PROCESSOR, VISION, video_layout
from mlx_vlm_mini.families.qwen3_vl import WEIGHTS as _QWEN3_VL

__all__ = [
    "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "VIDEO_TOKEN", "WEIGHTS", "config", "image_text", "pixels",
    "video_layout",
]  # fmt: skip

WEIGHTS: Weights = hybrid_weights(_QWEN3_VL)

CHAT_TEMPLATE = chat_template()


def config(hf: Mapping[str, Any]) -> VLMConfig:
    return whole(hf, hybrid_decoder(hf, QWEN3_5), "qwen3_5")


def whole(hf: Mapping[str, Any], decoder: DecoderConfig, family: str) -> VLMConfig:
    """The model with a tower of this config.json."""
    values = {**VISION, **(hf.get("vision_config") or {}), "deepstack_visual_indexes": ()}
    taps, places = (hf.get("vision_config") or {}).get("deepstack_visual_indexes"), values["num_position_embeddings"]
    if taps:
        raise CheckpointError(f"config.json: deepstack_visual_indexes must be empty in this family, not {taps}")
    if isqrt(places) ** 2 != places:
        raise CheckpointError(f"config.json: num_position_embeddings must be a square, not {places}")
    sizes = {"width": values["hidden_size"], "out": values["out_hidden_size"]}
    return grid_model(hf, decoder, family, {**values, **sizes}, patch_bias=True, position_side=isqrt(places))
