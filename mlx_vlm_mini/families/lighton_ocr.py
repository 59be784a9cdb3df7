"""LightOnOCR: Pixtral's tower, Mistral 3's merger, and Qwen3; reads pages.

Source: models/lighton_ocr of huggingface/transformers. An image's sides are whole patches and not whole tokens: an odd
last row or column of patches goes through the tower, and no token shows it. No break tokens stand in the prompt.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.families.parts.configs import text_decoder
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import image_text, pixels

from .mistral3 import PROJECTOR, merged_model
from .pixtral import pixtral_weights

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "WHOLE_PATCHES", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Pixtral"
WHOLE_PATCHES = True
"""Sides of images are multiples of the image processor's own patches, whatever becomes one token."""

WEIGHTS: Weights = {
    **pixtral_weights(PROJECTOR, tower="vision_encoder.", before="vision_projection."),
    **pixtral_weights(PROJECTOR),  # mlx-community's
}

CHAT_TEMPLATE = (  # a system turn without words opens a conversation that has none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<|image_pad|>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = {  # of a config without text_config
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "sliding_window": None, "vocab_size": 151936,
}  # fmt: skip
_VISION = {"hidden_act": "silu", "patch_size": 14}  # of a config without vision_config


def is_lighton(hf: Mapping[str, Any]) -> bool:
    """Whether a config that calls itself a Mistral 3 is of this family, as its first files did."""
    named = hf.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return hf.get("model_type") == "mistral3" and isinstance(first, str) and first.lower().startswith("lightonocr")


def config(hf: Mapping[str, Any]) -> VLMConfig:
    text, vision = hf.get("text_config"), hf.get("vision_config")
    decoder = text_decoder(
        {"model_type": "qwen3", **(_TEXT if text is None else text)},
        proven=("qwen3",),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
    )
    return merged_model(
        {**hf, "vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": False},
        "lighton_ocr",
        decoder,
        _VISION if vision is None else vision,
        image_token_id=hf.get("image_token_id", 151655),
    )
