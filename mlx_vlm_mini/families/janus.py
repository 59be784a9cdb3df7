"""Janus-Pro: a SigLIP-like tower, an MLP and Llama; image tokens through the same decoder, and a VQ decoder for them.

Sources: arXiv:2501.17811; models/janus of huggingface/transformers. GELU is exact in all of its parts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import BlockConfig, DrawingConfig, ProjectorConfig, VisionConfig, VLMConfig, VQConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, clip_weights, llama_weights, side, text_decoder
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

IMAGE_PROCESSOR = "Janus"

PREAMBLE = (  # before the rendered template, where processor_config.json says use_default_system_prompt
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
)
BEGIN_IMAGE, END_IMAGE = "<begin_of_image>", "<end_of_image>"

CHAT_TEMPLATE = (
    "{% set end = '<\uff5cend\u2581of\u2581sentence\uff5c>' %}"
    "{% for message in messages %}{% set role = message['role'] %}"
    "{% set open = not loop.last or add_generation_prompt %}"
    "{{ '<|User|>: ' if role == 'user' else '<|Assistant|>: ' if role == 'assistant' else role | capitalize + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{{ ('' if loop.first else '\n') + '<image_placeholder>' + ('' if loop.last else '\n') }}"
    "{% else %}{% set text = part['text'] %}"
    "{% if loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if loop.last %}{% set text = text.rstrip() %}{% endif %}"
    "{{ (' ' if not loop.first and loop.previtem['type'] == 'text' else '') + text }}"
    "{% endif %}{% endfor %}"
    "{% if open %}{{ '\n\n' if role == 'user' else end }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)

_MOST_DEPTH = 4  # of an MLP; the published ones have two layers


def _layers(theirs: str, ours: str, first: int) -> Weights:
    """Layers of an MLP after its first, `fc1`, which stands apart."""
    return {f"{theirs}hidden_layers.{number}": f"{ours}.{number + first}" for number in range(_MOST_DEPTH - 1)}


def _tower(prefix: str) -> Weights:
    names = clip_weights(prefix, post_norm=True)
    return {name.replace("out_proj", "projection_layer"): ours for name, ours in names.items() if ".head." not in name}


def _vq(prefix: str) -> Weights:
    """The VQ model's decoder; what makes tokens of pictures is not read."""
    block = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    attention = ("norm", "q", "k", "v", "proj_out")
    parts = [
        "conv_in", "norm_out", "conv_out", "up.{}.upsample.conv",
        *(f"mid.{name}.{part}" for name in ("block_1", "block_2") for part in block[:4]),
        *(f"mid.attn_1.{part}" for part in attention),
        *(f"up.{{}}.block.{{}}.{part}" for part in block),
        *(f"up.{{}}.attn.{{}}.{part}" for part in attention),
    ]  # fmt: skip
    return {
        prefix + "quantize.embedding.weight": "drawing.vq.codebook",
        prefix + "post_quant_conv": "drawing.vq.post_quant_conv",
        **{f"{prefix}decoder.{part}": f"drawing.vq.{part}" for part in parts},
        prefix + "encoder.*": None,
        prefix + "quant_conv": None,
    }


WEIGHTS: Weights = {
    **_tower("model.vision_model."),
    "model.aligner.fc1": "projector.layers.0",
    **_layers("model.aligner.", "projector.layers", 1),
    **llama_weights("model.language_model."),
    "lm_head": "decoder.lm_head",
    "model.generation_embeddings.weight": "drawing.embeddings",
    "model.generation_aligner.fc1": "drawing.aligner.fc1",
    **_layers("model.generation_aligner.", "drawing.aligner.hidden_layers", 0),
    "model.generation_head.proj_out": "drawing.head.proj_out",
    "model.generation_head.vision_head": "drawing.head.vision_head",
    **_vq("model.vqmodel."),
}

_VISION: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384, "patch_size": 16,
    "mlp_ratio": 4.0, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_bias": True, "depth": 2,
    "use_qk_norm": False,
}  # fmt: skip
_VQ: dict[str, Any] = {
    "num_embeddings": 16384, "embed_dim": 8, "latent_channels": 256, "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "out_channels": 3, "num_hidden_layers": 2,
    "hidden_act": "gelu", "projection_dim": 2048, "image_token_embed_dim": 2048,
}  # fmt: skip


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    if values["use_qk_norm"]:
        raise CheckpointError("config.json: use_qk_norm of the vision tower is not supported: no reference computes it")
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        intermediate_size=int(values["hidden_size"] * values["mlp_ratio"]),
        image_size=side(values["image_size"], "image_size"),
        patch_size=side(values["patch_size"], "patch_size"),
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=values["layer_norm_eps"],
        blocks=BlockConfig(qkv_bias=values["attention_bias"]),
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        feature_layers=(values["num_hidden_layers"],),
        drop_first_feature=False,
        resample_positions=False,
    )


def _depth(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_DEPTH:
        raise CheckpointError(f"config.json: {name} must be from 1 to {_MOST_DEPTH} layers, not {value!r}")
    return value


def _drawing(values: Mapping[str, Any], vision: VisionConfig) -> DrawingConfig:
    """`num_patches` is not read: pictures have the grid of those that are read, as in the reference."""
    if values["projection_dim"] != values["image_token_embed_dim"]:
        raise CheckpointError(
            f"config.json: projection_dim {values['projection_dim']} of vq_config is not its image_token_embed_dim "
            f"{values['image_token_embed_dim']}"
        )
    return DrawingConfig(
        vq=VQConfig(
            num_embeddings=values["num_embeddings"],
            embed_dim=values["embed_dim"],
            latent_channels=values["latent_channels"],
            base_channels=values["base_channels"],
            channel_multiplier=tuple(values["channel_multiplier"]),
            num_res_blocks=values["num_res_blocks"],
            out_channels=values["out_channels"],
        ),
        grid=vision.image_size // vision.patch_size,
        hidden_size=values["image_token_embed_dim"],
        num_layers=_depth(values["num_hidden_layers"], "num_hidden_layers of vq_config"),
        hidden_act=activation(values["hidden_act"]),
    )


def config(hf: Mapping[str, Any]) -> VLMConfig:
    text, values = hf.get("text_config") or {}, {**_VISION, **(hf.get("vision_config") or {})}
    decoder, tower = (
        text_decoder(text, proven=("llama",), tie_word_embeddings=hf.get("tie_word_embeddings", True)),
        _vision(values),
    )
    return VLMConfig(
        family="janus",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=_depth(values["depth"], "depth of vision_config"),
            hidden_act=activation(values["hidden_act"]),
            bias=True,
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 100581),
        image_grid_pinpoints=None,
        drawing=_drawing({**_VQ, **(hf.get("vq_config") or {})}, tower),
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return BEGIN_IMAGE + image_token * config.vision.num_features + END_IMAGE
