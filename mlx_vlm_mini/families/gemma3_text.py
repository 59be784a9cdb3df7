"""Gemma 3 without images (270M, 1B, and larger ones saved alone): the decoder of `gemma3.py`.

Sources: arXiv:2503.19786; models/gemma3 of huggingface/transformers (Gemma3ForCausalLM).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.families.parts.configs import llama_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.settings import ImageSettings

from . import gemma3

WEIGHTS: Weights = {**llama_weights("model."), "lm_head": "decoder.lm_head"}

IMAGE_PROCESSOR = gemma3.IMAGE_PROCESSOR

CHAT_TEMPLATE = gemma3.CHAT_TEMPLATE


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """Unlike in models with images, logits are capped where the config says so, as in transformers."""
    whole = gemma3.config({"mm_tokens_per_image": 196, "text_config": hf})
    return replace(
        whole,
        family="gemma3_text",
        decoder=replace(gemma3.text_config(hf), two_way="nothing"),
        image_token_id=None,
        image_place=None,
        text_alone=True,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    raise PromptError("family 'gemma3_text' reads text alone: leave the image out")


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    raise PromptError("family 'gemma3_text' reads text alone: leave the image out")
