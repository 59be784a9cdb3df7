"""The original LLaVA with a norm in front of its projector, whose layers then have other numbers.

Its `mm_projector_type` is `mlpNx_gelu` with `ln` somewhere behind it.

Source: llava/model/multimodal_projector/builder.py in internvl_chat_llava of github.com/OpenGVLab/InternVL.
"""

from mlx_vlm_mini.families.parts.maps import Weights

from . import llava_original
from .llava_original import CHAT_TEMPLATE, IMAGE_PROCESSOR, config, image_text, pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

WEIGHTS: Weights = {
    **{name: ours for name, ours in llava_original.WEIGHTS.items() if "mm_projector" not in name},
    "model.mm_projector.0": "projector.norm",
    **{f"model.mm_projector.{2 * i + 1}": f"projector.layers.{i}" for i in range(8)},
}
