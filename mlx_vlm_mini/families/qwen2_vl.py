"""Qwen2-VL: a tower of patch grids of any size, a merger, and Qwen2 with three positions a token.

Sources: arXiv:2409.12191; models/qwen2_vl of huggingface/transformers.

On the Hub config.json is flat, the decoder's keys beside `vision_config`; transformers 5 nests them. In `vision_config`
`embed_dim` is the tower's width and `hidden_size` the merger's output.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import VLMConfig
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
    video_layout,
)

__all__ = [
    "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "VIDEO_TOKEN", "WEIGHTS", "config", "image_text", "pixels",
    "video_layout",
]  # fmt: skip

VIDEO_PROCESSOR = "Qwen2VL"

PROMPT_LANGUAGE = r"<\|(?:object_ref|box|quad)_(?:start|end)\|>"

MERGER = {"ln_q": "norm", "mlp.0": "layers.0", "mlp.2": "layers.1"}
WEIGHTS: Weights = grid_weights({"fc1": "fc1", "fc2": "fc2"}, MERGER)

CHAT_TEMPLATE = chat_template("You are a helpful assistant.")

TEXT = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
    "rope_theta": 1e6,
}  # fmt: skip
SECTIONS = (16, 24, 24)
_VISION = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    decoder = sectioned_decoder(hf, "qwen2", TEXT, SECTIONS, interleaved=False)
    values = {**_VISION, **(hf.get("vision_config") or {})}
    width = values["embed_dim"]
    sizes = {"width": width, "out": values["hidden_size"], "intermediate_size": int(width * values["mlp_ratio"])}
    return grid_model(hf, decoder, "qwen2_vl", {**values, **sizes})
