"""Gemma 4 (12B): no tower; each square of 48 x 48 pixels becomes an embedding by norms and two matrices.

Source: models/gemma4_unified of huggingface/transformers. The decoder is `gemma4.py`'s, but in all of its layers an
image's tokens see the whole image, whatever the window. What a model hears (`embed_audio`) is left out.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import BlockConfig, GridConfig, ProjectorConfig, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import side
from mlx_vlm_mini.families.parts.gemma4 import CHAT_TEMPLATE, gemma4_decoder, gemma4_weights, image_text
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Gemma4Unified"

_VISION = {
    "patch_size": 16, "pooling_kernel_size": 3, "mm_embed_dim": 3840, "mm_posemb_size": 1120, "rms_norm_eps": 1e-6,
    "output_proj_dims": None,
}  # fmt: skip
_EMBEDDER = {
    "patch_ln1": "norm_pixels", "patch_dense": "patch_proj", "patch_ln2": "norm_patches", "pos_embedding": "pos_axes",
    "pos_norm": "norm",
}  # fmt: skip
_EPS = 1e-5  # of the layer norms; no config says it


def _image_weights() -> Weights:
    """Those of the Hub and mlx-community's, and those that transformers has in memory."""
    names: dict[str, str | tuple[str, ...] | None] = {}
    for whole in ("model.", ""):
        embed = whole + "embed_vision."
        for prefix in (whole + "vision_embedder.", embed):
            names |= {prefix + theirs: f"vision.{ours}" for theirs, ours in _EMBEDDER.items()}
        for prefix in (embed, embed + "multimodal_embedder."):
            names[prefix + "embedding_projection"] = "projector.layers.0"
    return names


WEIGHTS: Weights = {**gemma4_weights(), **_image_weights()}


def config(hf: Mapping[str, Any]) -> VLMConfig:
    values = {**_VISION, **(hf.get("vision_config") or {})}
    width = values["mm_embed_dim"]
    if values["output_proj_dims"] not in (None, width):
        raise CheckpointError("config.json: output_proj_dims must be mm_embed_dim")
    patch = side(values["patch_size"], "patch_size") * side(values["pooling_kernel_size"], "pooling_kernel_size")
    decoder = gemma4_decoder(
        hf.get("text_config") or {},
        "images_whole",
        use_bidirectional_attention="vision",
        sliding_window=1024,
        max_position_embeddings=262144,
        hidden_size_per_layer_input=0,
    )
    return VLMConfig(
        family="gemma4_unified",
        vision=VisionConfig(
            hidden_size=width,
            num_hidden_layers=0,
            num_attention_heads=1,  # of blocks, and there are none
            intermediate_size=1,
            image_size=patch,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=_EPS,
            blocks=BlockConfig(),
            class_token=False,
            patch_bias=True,
            pre_norm=False,
            post_norm=True,
            feature_layers=(0,),
            drop_first_feature=False,
            resample_positions=False,
            grid=GridConfig(linear_patches=True, places=values["mm_posemb_size"]),
        ),
        projector=ProjectorConfig(
            input_size=width,
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=False,
            norm_eps=values["rms_norm_eps"],
            norm_type="rms_norm_bare",
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 258880),
        image_grid_pinpoints=None,
    )
