"""LLaVA-1.5 and its kin: CLIP or SigLIP, an MLP, and Llama, Mistral or Qwen2.

Sources: arXiv:2310.03744; models/llava of huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.families.parts.configs import LLAVA_WEIGHTS, llava_config
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

WEIGHTS: Weights = LLAVA_WEIGHTS

IMAGE_PROCESSOR = "Llava"

CHAT_TEMPLATE = (  # LLaVA-1.5's prompt, as its authors and llava-hf give it
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    return llava_config(hf, "llava")


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return image_token * config.vision.num_features
