"""Pixtral: images of any size up to a longest edge, a token a patch, a break token behind each row, and Mistral.

Sources: arXiv:2410.07073; models/pixtral and models/llava of huggingface/transformers. Its config.json calls itself a
`llava` whose tower is a `pixtral`; mlx-community's calls itself a `pixtral`.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import BlockConfig, GridConfig, ProjectorConfig, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, from_start, side, text_decoder, vlm_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import fitting_grid, pixels
from mlx_vlm_mini.preprocessing.settings import ImageSettings

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Pixtral"

SAID = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ '[IMG]' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
)
CHAT_TEMPLATE = (  # a system message opens the last question
    SAID + "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and system %}{{ said(system) + '\n\n' }}{% endif %}{{ said(message['content']) + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ said(message['content']) + eos_token }}{% endif %}{% endfor %}"
)

_EPS = 1e-5  # of the tower's norms; no config says it
_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_channels": 3, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip


def is_pixtral(hf: Mapping[str, Any]) -> bool:
    vision = hf.get("vision_config")
    return hf.get("model_type") == "llava" and isinstance(vision, dict) and vision.get("model_type") == "pixtral"


def pixtral_weights(
    projector: Mapping[str, str], *, tower: str = "vision_tower.", before: str = "multi_modal_projector."
) -> Weights:
    """Names of a whole model in all layouts.

    Args:
        projector: its modules' names to ours.
        tower, before: what stands before the names of the tower and of the projector.
    """
    names = {theirs: ours for theirs, ours in vlm_weights().items() if "vision_tower." not in theirs}
    for whole in ("", "model."):
        names |= {f"{whole}{before}{name}": f"projector.{ours}" for name, ours in projector.items()}
        for prefix in (f"{whole}{tower}", f"{whole}{tower}vision_model."):
            block, ours = prefix + "transformer.layers.{}.", "vision.blocks.{}."
            names |= {prefix + "patch_conv": "vision.patch_embed", prefix + "ln_pre": "vision.norm_pre"}
            names |= {block + "attention_norm": ours + "norm1", block + "ffn_norm": ours + "norm2"}
            names |= {f"{block}attention.{name}_proj": f"{ours}attn.{name}_proj" for name in "qkvo"}
            names |= {f"{block}feed_forward.{name}_proj": f"{ours}mlp.{name}_proj" for name in ("gate", "up", "down")}
    return names


WEIGHTS: Weights = pixtral_weights({"linear_1": "layers.0", "linear_2": "layers.1"})


def pixtral_tower(hf: Mapping[str, Any], layers: int | list[int], *, merge: int = 1) -> VisionConfig:
    """The tower of a vision_config; the projector joins squares of `merge` x `merge` of its features."""
    values = {**_VISION, **hf}
    rope = values.get("rope_parameters") or values
    if rope.get("rope_theta", 10000.0) != 10000.0 or values["num_channels"] != 3:
        raise CheckpointError("config.json: the tower's rope_theta must be 10000, and num_channels 3")
    if values.get("head_dim") not in (None, values["hidden_size"] // values["num_attention_heads"]):
        raise CheckpointError("config.json: the tower's head_dim must be hidden_size / num_attention_heads")
    depth, patch = values["num_hidden_layers"], side(values["patch_size"], "patch_size")
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_hidden_layers=depth,
        num_attention_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        image_size=patch * merge,
        patch_size=patch,
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=_EPS,
        blocks=BlockConfig(norm_type="rms_norm", qkv_bias=False, o_bias=False, gated_mlp=True, mlp_bias=False),
        class_token=False,
        patch_bias=False,
        pre_norm=True,
        post_norm=False,
        feature_layers=tuple(from_start(layer, depth) for layer in ([layers] if isinstance(layers, int) else layers)),
        drop_first_feature=False,
        resample_positions=False,
        grid=GridConfig(alternating=True),
    )


def config(hf: Mapping[str, Any]) -> VLMConfig:
    decoder = text_decoder(hf.get("text_config") or {}, tie_word_embeddings=hf.get("tie_word_embeddings", False))
    if hf.get("vision_feature_select_strategy", "full") != "full":
        raise CheckpointError("config.json: this tower has no class token, so vision_feature_select_strategy is 'full'")
    layer = -1 if hf.get("model_type") == "pixtral" else -2  # the default of mlx-community's class, or of transformers'
    tower = pixtral_tower(hf.get("vision_config") or {}, hf.get("vision_feature_layer", layer))
    return VLMConfig(
        family="pixtral",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=2,
            hidden_act=activation(hf.get("projector_hidden_act", "gelu")),
            bias=hf.get("multimodal_projector_bias", True),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 32000)),
        image_grid_pinpoints=None,
    )


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    grid = fitting_grid(config, settings)
    rows, columns = (side // grid.factor for side in grid.fit(size))
    return "[IMG_BREAK]".join([image_token * columns] * rows) + "[IMG_END]"
