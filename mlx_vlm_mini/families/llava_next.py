"""LLaVA-NeXT (LLaVA 1.6): LLaVA-1.5's parts, and images cut into tiles at a resolution that fits them.

Sources: llava-vl.github.io/blog/2024-01-30-llava-next; models/llava_next of huggingface/transformers.

The prompt of an image: its squashed whole, one token a patch; then the tiles as one grid, row by row, without the bars
that made the image fit, `image_newline` after each row (`anyres.pack`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import LLAVA_WEIGHTS, llava_config
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.anyres import Tiling, count_tokens, cut, read_pinpoints
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import LLAVA_NEXT_PINPOINTS, ImageSettings

WEIGHTS: Weights = {
    **LLAVA_WEIGHTS,
    "image_newline": "image_newline",
    "model.image_newline": "image_newline",
}

IMAGE_PROCESSOR = "LlavaNext"

CHAT_TEMPLATE = (  # each of the family's decoders was trained on a prompt of its own, which no config names
    "{{ raise_exception('the checkpoint has no chat template, and those of LLaVA-NeXT differ; "
    "copy chat_template.json from the original repository') }}"
)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    given = hf.get("image_grid_pinpoints")
    plain = llava_config(hf, "llava_next")
    pinpoints = read_pinpoints(LLAVA_NEXT_PINPOINTS if given is None else given, plain.vision.image_size, "config.json")
    return replace(plain, image_grid_pinpoints=pinpoints, tile_merge="unpad")


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    assert isinstance(settings.tiling, Tiling)  # loading.py has seen to it
    pieces = [preprocess(piece, settings) for piece in cut(image, settings.tiling, settings.resample)]
    if len({piece.shape for piece in pieces}) > 1:
        raise CheckpointError(
            "preprocessor_config.json: by its size and crop_size an image and its tiles differ in size"
        )
    return np.stack(pieces)


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    """As many tokens as the image processor's settings promise; the model has its own in config.json."""
    assert isinstance(settings.tiling, Tiling)
    side = config.vision.image_size // config.vision.patch_size
    tokens = count_tokens(size, settings.tiling.pinpoints, tile_size=settings.tiling.tile_size, side=side)
    return image_token * tokens
