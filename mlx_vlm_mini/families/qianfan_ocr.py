"""Qianfan-OCR: InternVL with Qwen3, in its authors' tensor names and with transformers' config.

Source: models/qianfan_ocr of huggingface/transformers. The chat template writes `<image>`, which is no token, where an
image stands.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.families.parts.configs import llama_weights
from mlx_vlm_mini.families.parts.maps import Weights, intern_vit, native_intern_vit

from .internvl import CHAT_TEMPLATE as INTERNVL
from .internvl import IMAGE_PROCESSOR, VISION, image_text, native_model, pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

PLACE = "<image>"

_PROJECTOR = {"0": ("layer_norm", "norm"), "1": ("linear_1", "layers.0"), "3": ("linear_2", "layers.1")}
WEIGHTS: Weights = {
    **intern_vit("vision_model."),
    **{f"mlp1.{number}": f"projector.{ours}" for number, (_, ours) in _PROJECTOR.items()},
    **llama_weights("language_model.model."),
    "language_model.lm_head": "decoder.lm_head",
    **llama_weights("language_model.model.encoder."),  # as transformers 5.23 saves the decoder's layers
    # As transformers has them in memory.
    **native_intern_vit("model.vision_tower.", layers="layers"),
    **{f"model.multi_modal_projector.{theirs}": f"projector.{ours}" for theirs, ours in _PROJECTOR.values()},
    **llama_weights("model.language_model."),
    "lm_head": "decoder.lm_head",
}

CHAT_TEMPLATE = INTERNVL.replace("<IMG_CONTEXT>", PLACE)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    model = native_model(
        hf,
        "qianfan_ocr",
        {**VISION, "attention_bias": True},
        {"model_type": "qwen3"},
        proven=("qwen3",),
        tie_word_embeddings=False,
    )
    return replace(model, image_place=PLACE)
