"""Qwen3.5-MoE: Qwen3.5 whose feed-forwards are experts, beside one that every token has.

Source: models/qwen3_5_moe of huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.families.parts.hybrid import hybrid_decoder
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.moe import moe_weights, with_experts, without_experts
from mlx_vlm_mini.families.qwen3_5 import (
    CHAT_TEMPLATE,
    IMAGE_PROCESSOR,
    VIDEO_PROCESSOR,
    VIDEO_TOKEN,
    image_text,
    pixels,
    video_layout,
    whole,
)
from mlx_vlm_mini.families.qwen3_5 import WEIGHTS as _DENSE

__all__ = [
    "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "VIDEO_TOKEN", "WEIGHTS", "config", "image_text", "pixels",
    "video_layout",
]  # fmt: skip

WEIGHTS: Weights = moe_weights(_DENSE)

_TEXT = {
    "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "rope_theta": 1e4,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    plain, text = without_experts(hf, _TEXT)
    return whole(hf, with_experts(hybrid_decoder(plain, {}), text), "qwen3_5_moe")
