"""LLaVA-OneVision: LLaVA-NeXT's tiles by SigLIP and Qwen2, more of them, and none where there are several images.

Sources: arXiv:2408.03326; models/llava_onevision of huggingface/transformers.

The prompt of the only image of a conversation: as LLaVA-NeXT's, from 36 grids; rows and columns that are more than
`anyres_max_9` allows are shrunk to nine tiles' (`anyres.pack`). Of several images, in whatever turns, each is padded to
a square, and stands there with one token a patch and `image_newline`: a second image changes the slots of the first.
Videos are not read.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import llava_config
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.anyres import Tiling, count_tokens, read_pinpoints
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import LLAVA_ONEVISION_PINPOINTS, ImageSettings

from . import llava_next

WEIGHTS: Weights = llava_next.WEIGHTS

IMAGE_PROCESSOR = "LlavaOnevision"

CHAT_TEMPLATE = (  # Qwen's, a message's images first, as convert_llava_onevision_weights_to_hf.py writes it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_VISION = {  # of a config without vision_config
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    vision, given = hf.get("vision_config"), hf.get("image_grid_pinpoints")
    completed = {
        "image_token_index": 151646,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **hf,
        "vision_config": {"model_type": "siglip_vision_model", **(_VISION if vision is None else vision)},
        "text_config": {"model_type": "qwen2", **(hf.get("text_config") or {})},
    }
    plain = llava_config(completed, "llava_onevision")
    pinpoints = LLAVA_ONEVISION_PINPOINTS if given is None else given
    ratio = hf.get("vision_aspect_ratio", "anyres_max_9")
    most = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio if isinstance(ratio, str) else "")
    if most is None:
        raise CheckpointError(f"config.json: vision_aspect_ratio must be anyres_max_9 or the like, not {ratio!r}")
    return replace(
        plain,
        image_grid_pinpoints=read_pinpoints(pinpoints, plain.vision.image_size, "config.json"),
        tile_merge="unpad",
        most_tiles=int(most[1]),
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None] if settings.tiling is None else llava_next.pixels(image, settings)


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    side = config.vision.image_size // config.vision.patch_size
    if settings.tiling is None:
        return image_token * (side * side + 1)
    assert isinstance(settings.tiling, Tiling)
    pinpoints, tile_size = settings.tiling.pinpoints, settings.tiling.tile_size
    return image_token * count_tokens(size, pinpoints, tile_size=tile_size, side=side, most_tiles=config.most_tiles)
