"""Qwen3-VL: a tower with learned positions besides, taps of it for the decoder's first layers, and Qwen3.

Sources: arXiv:2511.21631; models/qwen3_vl of huggingface/transformers. Its three positions a token are interleaved. The
features of the blocks in `deepstack_visual_indexes` are added to the image tokens behind the decoder's first layers.
Of a video each step stands for itself, as a picture behind its time in words.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from mlx_vlm_mini.config import DecoderConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import (
    IMAGE_PROCESSOR,
    VIDEO_TOKEN,
    chat_template,
    grid_model,
    grid_weights,
    image_text,
    pixels,
    sectioned_decoder,
)
from mlx_vlm_mini.preprocessing.video import Clip, VideoLayout

__all__ = [
    "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "VIDEO_TOKEN", "WEIGHTS", "config", "image_text", "pixels",
    "video_layout",
]  # fmt: skip

VIDEO_PROCESSOR = "Qwen3VL"

WEIGHTS: Weights = grid_weights(
    {"linear_fc1": "fc1", "linear_fc2": "fc2"}, {"norm": "norm", "linear_fc1": "layers.0", "linear_fc2": "layers.1"}
)

PROMPT_LANGUAGE = r"<\|(?:object_ref|box|quad)_(?:start|end)\|>"

CHAT_TEMPLATE = chat_template()

_TEXT = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000,
    "rope_theta": 5e5,
}  # fmt: skip
VISION = {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304, "num_heads": 16,
    "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24),
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    return whole(hf, make_decoder(hf, _TEXT), "qwen3_vl")


def make_decoder(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of this config.json; `defaults` are the class's."""
    return sectioned_decoder(hf, "qwen3", defaults, (24, 20, 20), interleaved=True)


def whole(hf: Mapping[str, Any], decoder: DecoderConfig, family: str) -> VLMConfig:
    """The model with a tower of this config.json."""
    values = {**VISION, **(hf.get("vision_config") or {})}
    taps, places = tuple(values["deepstack_visual_indexes"]), values["num_position_embeddings"]
    if taps != tuple(sorted(set(taps))) or len(taps) > decoder.num_hidden_layers:
        raise CheckpointError(f"config.json: deepstack_visual_indexes {list(taps)} do not fit the decoder's layers")
    if isqrt(places) ** 2 != places:
        raise CheckpointError(f"config.json: num_position_embeddings must be a square, not {places}")
    return grid_model(
        hf,
        decoder,
        family,
        {**values, "width": values["hidden_size"], "out": values["out_hidden_size"]},
        patch_bias=True,
        taps=taps,
        position_side=isqrt(places),
    )


def video_layout(config: VLMConfig, clip: Clip, image_token: str) -> VideoLayout:
    """A video's steps, the time of each in front of its tokens.

    As the authors wrote it nothing stands around the whole; transformers 5.23 keeps the pair of tokens that the chat
    template writes there.
    """
    steps, height, width, _ = clip.pixel_values.shape
    own = image_token * (height // config.vision.image_size * (width // config.vision.image_size))
    said = [f"<{seconds:.1f} seconds><|vision_start|>{own}<|vision_end|>" for seconds in clip.seconds]
    return VideoLayout("".join(said), (0,) * steps, around=("<|vision_start|>", "<|vision_end|>"))
