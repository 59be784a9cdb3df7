"""The families that this package reads, by the `model_type` of their config.json."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.settings import ImageSettings

from . import (
    blip2,
    gemma3,
    gemma3_text,
    gemma4,
    gemma4_unified,
    glm4v,
    glm_ocr,
    granite_docling,
    idefics3,
    internvl,
    internvl_chat,
    janus,
    lighton_ocr,
    llava,
    llava_next,
    llava_normed,
    llava_onevision,
    llava_original,
    minicpmv4_6,
    mistral3,
    mllama,
    paddleocr_vl,
    paligemma,
    pixtral,
    qianfan_ocr,
    qllama,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    qwen_vl,
)


class Family(Protocol):
    """What one file of this folder says."""

    WEIGHTS: Weights
    """Checkpoint name -> ours, of tensors or whole modules; `{}` is a layer number, None drops on purpose."""

    CHAT_TEMPLATE: str
    """Jinja template for checkpoints that carry none."""

    IMAGE_PROCESSOR: str
    """The image processor's class where its settings name none, without `ImageProcessor`."""

    # slices(image, settings), where there are `Slices`: the rows of another size, or None.

    # PREAMBLE, where there is one: text before the rendered template, of folders whose processor_config.json says
    # use_default_system_prompt.
    # PROMPT_LANGUAGE, where there is one: an expression for the tokens that people may write in prompts (boxes,
    # references, places), but for those of a program that serves others. All other special tokens are text there.

    def config(self, hf: Mapping[str, Any]) -> VLMConfig:
        """config.json in our terms."""

    def pixels(self, image: Image.Image, settings: ImageSettings) -> np.ndarray:
        """An RGB image as float32[B, height, width, 3]: one row, or one a tile."""

    def image_text(self, config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
        """What stands in the prompt's text for an image of `size`, height and width: one `image_token` an embedding."""


FAMILIES: dict[str, Family] = {
    "blip-2": blip2,
    "instructblip": blip2,
    "gemma3": gemma3,
    "gemma3_text": gemma3_text,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "glm46v": glm4v,
    "glm4v": glm4v,
    "glm_ocr": glm_ocr,
    "granite_docling": granite_docling,
    "idefics3": idefics3,
    "internvl": internvl,
    "internvl_chat": internvl_chat,
    "janus": janus,
    "lighton_ocr": lighton_ocr,
    "llava": llava,
    "llava_llama": llava_original,
    "llava_mistral": llava_original,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "minicpmv4_6": minicpmv4_6,
    "mistral3": mistral3,
    "mllama": mllama,
    "paddleocr_vl": paddleocr_vl,
    "paligemma": paligemma,
    "pixtral": pixtral,
    "qianfan_ocr": qianfan_ocr,
    "qwen": qwen_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "smolvlm": idefics3,
}


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: no family has this `model_type`.
    """
    model_type = hf.get("model_type")
    if llava_original.is_original(hf):
        return llava_normed if llava_original.has_norm(hf) else llava_original
    if qllama.is_qllama(hf):
        return qllama
    if pixtral.is_pixtral(hf):
        return pixtral
    if lighton_ocr.is_lighton(hf):
        return lighton_ocr
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type in ("clip", "vilt"):
            raise CheckpointError(f"config.json says model_type '{model_type}', for which there is mlx-vlm-mini score")
        known = ", ".join(sorted(FAMILIES))
        what = "has no model_type" if model_type is None else f"says model_type '{model_type}'"
        raise CheckpointError(f"config.json {what}; this version knows: {known}")
    return FAMILIES[model_type]
