"""Qwen3-VL-MoE: Qwen3-VL whose feed-forwards are experts.

Source: models/qwen3_vl_moe of huggingface/transformers. The Hub's files have an expert's matrices as (in, out), those
that transformers 5 writes as (out, in), under the same names.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.moe import moe_weights, with_experts, without_experts
from mlx_vlm_mini.families.qwen3_vl import (
    CHAT_TEMPLATE,
    IMAGE_PROCESSOR,
    VIDEO_PROCESSOR,
    VIDEO_TOKEN,
    image_text,
    make_decoder,
    pixels,
    video_layout,
    whole,
)
from mlx_vlm_mini.families.qwen3_vl import WEIGHTS as _DENSE

__all__ = [
    "CHAT_TEMPLATE", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "VIDEO_TOKEN", "WEIGHTS", "config", "image_text", "pixels",
    "video_layout",
]  # fmt: skip

WEIGHTS: Weights = moe_weights(_DENSE)

_TEXT = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": None, "max_position_embeddings": 128000, "rope_theta": 5e5,
    "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_experts": 60,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    plain, text = without_experts(hf, _TEXT)
    return whole(hf, with_experts(make_decoder(plain, {}), text), "qwen3_vl_moe")
