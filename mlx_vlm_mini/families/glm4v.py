"""GLM-4.1V and GLM-4.6V-Flash: a tower of patch grids with positions resized cubically, a gated merger, and GLM-4.

Source: models/glm4v and glm46v of huggingface/transformers; config.json files as they are on the Hub. In vision_config
the tower's own MLPs are `out_hidden_size` wide, and the merger's `intermediate_size`. Of each head's numbers half are
rotated, each even one against the next. Videos are not read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_mini.config import (
    BlockConfig,
    DecoderConfig,
    LayerShape,
    LayerType,
    MergerConfig,
    ProjectorConfig,
    VisionConfig,
    VLMConfig,
)
from mlx_vlm_mini.families.parts.configs import activation, llama_weights, side
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import (
    grid_tower,
    image_text,
    merger_projector,
    pixels,
    sectioned_decoder,
)

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Glm4v"

_BLOCK, _LAYER = "vision.blocks.{}.", "decoder.layers.{}."
_GATED = ("gate_proj", "up_proj", "down_proj")
_DRAFT = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")  # of a drafting layer


def _tower(prefix: str) -> Weights:
    block = prefix + "blocks.{}."
    return {
        prefix + "patch_embed.proj": "vision.patch_embed",
        prefix + "post_conv_layernorm": "vision.norm_pre",
        prefix + "embeddings.position_embedding.weight": "vision.pos_embed",
        **{block + name: _BLOCK + name for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm")},
        block + "attn.qkv": tuple(f"{_BLOCK}attn.{name}_proj" for name in "qkv"),
        block + "attn.proj": _BLOCK + "attn.o_proj",
        **{f"{block}mlp.{name}": f"{_BLOCK}mlp.{name}" for name in _GATED},
        prefix + "post_layernorm": "vision.norm",
        prefix + "downsample": "projector.downsample",
        prefix + "merger.proj": "projector.proj",
        prefix + "merger.post_projection_norm": "projector.norm",
        **{f"{prefix}merger.{name}": f"projector.mlp.{name}" for name in _GATED},
    }


def _decoder(prefix: str) -> Weights:
    """A Llama's with norms on both sides, whose names are others here, and a fused gate."""
    layer = prefix + "layers.{}."
    other = ("feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj")
    return {
        **{name: ours for name, ours in llama_weights(prefix).items() if not name.endswith(other)},
        layer + "post_self_attn_layernorm": _LAYER + "post_attention_layernorm",
        layer + "post_attention_layernorm": _LAYER + "pre_feedforward_layernorm",
        layer + "post_mlp_layernorm": _LAYER + "post_feedforward_layernorm",
        layer + "mlp.gate_up_proj": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
        **{layer + name: None for name in _DRAFT},
    }


WEIGHTS: Weights = {
    **_tower("model.visual."),
    **_decoder("model.language_model."),
    "lm_head": "decoder.lm_head",
    **_tower("vision_tower."),  # mlx-community's
    **_decoder("language_model.model."),
    "language_model.lm_head": "decoder.lm_head",
}

CHAT_TEMPLATE = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<|begin_of_image|><|image|><|end_of_image|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_TEXT = {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
_SECTIONS = (8, 12, 12)
_VISION = {
    "depth": 24, "hidden_size": 1536, "hidden_act": "silu", "attention_bias": False, "num_heads": 12, "in_channels": 3,
    "image_size": 336, "patch_size": 14, "rms_norm_eps": 1e-5, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "out_hidden_size": 4096, "intermediate_size": 13696,
}  # fmt: skip


def glm_decoder(hf: Mapping[str, Any], defaults: Mapping[str, Any], *, bias: bool) -> DecoderConfig:
    """GLM-4 with three positions a token; `bias`: of queries, keys and values."""
    text = {**defaults, **(hf.get("text_config") or {})}
    decoder = sectioned_decoder(
        {**hf, "text_config": {**text, "attention_bias": False, "use_sliding_window": False}},
        "qwen2" if bias else "llama",
        {},
        _SECTIONS,
        interleaved=False,
    )
    shapes: dict[LayerType, LayerShape] = {"full_attention": replace(decoder.shape("full_attention"), neighbours=True)}
    return replace(decoder, norms=replace(decoder.norms, sandwich=True), shapes=shapes)


def gated_projector(
    tower: VisionConfig, decoder: DecoderConfig, values: Mapping[str, Any], inner_size: int
) -> ProjectorConfig:
    """The merger, whose gated MLP is `inner_size` wide."""
    merger = MergerConfig(norm_type="layer_norm", kind="gated", inner_size=inner_size)
    projector = merger_projector(tower, decoder, {**values, "out": values["out_hidden_size"]}, merger, eps=1e-5)
    return replace(projector, hidden_act=activation(values["hidden_act"]), bias=False)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    decoder = glm_decoder(hf, _TEXT, bias=True)
    values = {**_VISION, **(hf.get("vision_config") or {})}
    tower = grid_tower(
        {**values, "width": values["hidden_size"], "intermediate_size": values["out_hidden_size"]},
        blocks=BlockConfig(
            norm_type="rms_norm", qkv_bias=values["attention_bias"], o_bias=False, gated_mlp=True, mlp_bias=False
        ),
        eps=values["rms_norm_eps"],
        pre_norm=True,
        post_norm=True,
        frames=side(values["temporal_patch_size"], "temporal_patch_size"),
        position_side=side(values["image_size"], "image_size") // side(values["patch_size"], "patch_size"),
        position_resize="cubic",
    )
    return VLMConfig(
        family=hf.get("model_type", "glm4v"),
        vision=tower,
        projector=gated_projector(tower, decoder, values, values["intermediate_size"]),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 151343),
        image_grid_pinpoints=None,
    )
