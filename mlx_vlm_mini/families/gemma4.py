"""Gemma 4 (31B, 26B-A4B, E4B, E2B): a tower for images of any size, whose features are averaged, and a decoder with two
shapes of attention.

Source: models/gemma4 of huggingface/transformers. An image is as large as a budget of 70 to 1120 tokens allows
(`--image-tokens`). In the larger two an image's tokens see one another in layers with a window. 26B-A4B has experts
beside the MLP; E2B and E4B have embeddings for single layers, the tower's linear layers clipped, and E2B layers with
the keys and values of others. What a model hears (`audio_tower`) is left out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import (
    BlockConfig,
    GridConfig,
    GridPoolConfig,
    ProjectorConfig,
    VisionConfig,
    VLMConfig,
)
from mlx_vlm_mini.decoder.rope import rope_type
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, side
from mlx_vlm_mini.families.parts.gemma4 import CHAT_TEMPLATE, gemma4_decoder, gemma4_weights, image_text
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Gemma4"

_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
    "num_key_value_heads": None, "head_dim": None, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3, "patch_size": 16, "position_embedding_size": 10240, "use_clipped_linears": False,
    "standardize": False, "attention_bias": False,
}  # fmt: skip
_BLOCK = {
    "input_layernorm": "norm1", "post_attention_layernorm": "norm1_post", "pre_feedforward_layernorm": "norm2",
    "post_feedforward_layernorm": "norm2_post", "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
}  # fmt: skip


def _tower_weights() -> Weights:
    names: dict[str, str | tuple[str, ...] | None] = {}
    for whole in ("model.", ""):
        tower = f"{whole}vision_tower."
        block, ours = tower + "encoder.layers.{}.", "vision.blocks.{}."
        names |= {
            f"{tower}patch_embedder.input_proj": "vision.patch_embed.proj",
            f"{tower}patch_embedder.position_embedding_table": "vision.pos_axes",
            f"{tower}std_bias": "projector.std_bias",
            f"{tower}std_scale": "projector.std_scale",
            f"{whole}embed_vision.embedding_projection": "projector.layers.0",
            **{block + theirs: ours + own for theirs, own in _BLOCK.items()},
        }
        for part, own, layers in (("self_attn", "attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
            for layer in layers:
                theirs, mine = f"{block}{part}.{layer}_proj", f"{ours}{own}.{layer}_proj"
                names |= {theirs: mine, f"{theirs}.linear": f"{mine}.linear"}
    return names


WEIGHTS: Weights = {**gemma4_weights(), **_tower_weights()}


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """From -1 to 1, which no file says."""
    return 2 * (preprocess(image, settings)[None] - np.float32(0.5))


def _tower(hf: Mapping[str, Any]) -> VisionConfig:
    values = {**_VISION, **hf}
    heads, width, rope = values["num_attention_heads"], values["hidden_size"], values.get("rope_parameters") or {}
    if values["head_dim"] not in (None, width // heads) or values["num_key_value_heads"] not in (None, heads):
        raise CheckpointError(
            "config.json: the tower's head_dim must be hidden_size / num_attention_heads, and num_key_value_heads "
            "num_attention_heads"
        )
    if values["attention_bias"] or rope_type(rope) not in ("default", "axial"):
        raise CheckpointError("config.json: the tower takes neither attention_bias nor a scaled rope")
    patch = side(values["patch_size"], "patch_size")
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        intermediate_size=values["intermediate_size"],
        image_size=patch * side(values["pooling_kernel_size"], "pooling_kernel_size"),
        patch_size=patch,
        hidden_act=activation(values["hidden_activation"]),
        layer_norm_eps=values["rms_norm_eps"],
        blocks=BlockConfig(
            norm_type="rms_norm_float32", qkv_bias=False, o_bias=False, gated_mlp=True, mlp_bias=False, sandwich=True,
            clipped=values["use_clipped_linears"],
        ),
        class_token=False,
        patch_bias=False,
        pre_norm=False,
        post_norm=False,
        feature_layers=(values["num_hidden_layers"],),
        drop_first_feature=False,
        resample_positions=False,
        grid=GridConfig(
            linear_patches=True,
            places=values["position_embedding_size"],
            axial_theta=rope.get("rope_theta", 100.0),
        ),
    )  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    vision = hf.get("vision_config") or {}
    tower, decoder = _tower(vision), gemma4_decoder(hf.get("text_config") or {}, "images_in_window")
    return VLMConfig(
        family="gemma4",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=False,
            norm_eps=tower.layer_norm_eps,
            norm_type="rms_norm_bare",
            grid_pool=GridPoolConfig(
                factor=tower.image_size // tower.patch_size, standardize=vision.get("standardize", False)
            ),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 258880),
        image_grid_pinpoints=None,
    )
