"""What families share whose decoders mix layers with a recurrent state and layers of full attention: Qwen3.5
and MiniCPM-V 4.6.

Source: models/qwen3_5 of huggingface/transformers; config.json files as they are on the Hub.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from mlx_vlm_mini.config import DecoderConfig, DeltaConfig, LayerShape, LayerType
from mlx_vlm_mini.errors import CheckpointError

from .maps import Raised, Weights
from .patch_grids import sectioned_decoder

QWEN3_5 = {  # the class's defaults of the dense ones
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32768,
    "rope_theta": 1e4,
}  # fmt: skip
_SECTIONS = (11, 11, 10)
_LINEAR = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
}  # fmt: skip
_LAYER = "decoder.layers.{}."
_DELTA = (
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log", "dt_bias", "norm", "out_proj",
)  # fmt: skip
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
_RAISED = "language_model.model."  # mlx-community's names, in whose files norms have their 1 already


def hybrid_weights(names: Weights, more: tuple[str, ...] = ()) -> dict[str, str | tuple[str, ...] | None]:
    """A Qwen's names with those of its linear layers; a layer that drafts tokens ahead (`mtp`) is dropped.

    Args:
        more: what a decoder's names begin with, besides the usual ones.
    """
    found = dict(names)
    for prefix in (*_PREFIXES, *more):
        layer = prefix + "layers.{}.linear_attn."
        found |= {layer + name: f"{_LAYER}linear_attn.{name}" for name in _DELTA}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    found |= {f"{_RAISED}layers.{{}}.{name}": Raised(_LAYER + name) for name in norms}
    return found | {_RAISED + "norm": Raised("decoder.norm"), "mtp.*": None}


def hybrid_decoder(hf: Mapping[str, Any], defaults: Mapping[str, Any], *, sectioned: bool = True) -> DecoderConfig:
    """A Qwen3 whose layers are of two kinds, whose attention is gated and whose norms add 1 to their weights.

    Args:
        defaults: the class's.
        sectioned: whether tokens have three positions.
    """
    text = {**_LINEAR, **defaults, **(hf.get("text_config") or hf)}
    rope = {**(text.get("rope_scaling") or text.get("rope_parameters") or {})}
    rope.setdefault("partial_rotary_factor", text.get("partial_rotary_factor") or 0.25)
    plain = {**text, "rope_parameters": rope, "rope_scaling": None, "use_sliding_window": False}
    decoder = sectioned_decoder({**hf, "text_config": plain}, "qwen3", {}, _SECTIONS, interleaved=True)
    if decoder.hidden_act != "silu":  # which the reference's two ways to compute a delta net take differently
        raise CheckpointError(f"config.json: a gated delta net takes the activation silu, not {decoder.hidden_act!r}")
    if not sectioned:
        scaling = decoder.rope_scaling or {}
        decoder = replace(decoder, rope_scaling={key: scaling[key] for key in scaling if not key.startswith("mrope")})
    full = decoder.shape("full_attention")
    return replace(
        decoder,
        norms=replace(decoder.norms, rms_norm_offset=1.0),
        layer_types=_layer_types(text, decoder.num_hidden_layers),
        shapes={"full_attention": LayerShape(**{**vars(full), "gated": True})},
        delta=DeltaConfig(
            num_key_heads=text["linear_num_key_heads"],
            num_value_heads=text["linear_num_value_heads"],
            key_head_dim=text["linear_key_head_dim"],
            value_head_dim=text["linear_value_head_dim"],
            conv_kernel=text["linear_conv_kernel_dim"],
        ),
    )


def _layer_types(text: Mapping[str, Any], layers: int) -> tuple[LayerType, ...]:
    """As config.json lists them; without a list every fourth layer attends.

    Raises:
        CheckpointError: a layer is of another kind.
    """
    every = text["full_attention_interval"]
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    unknown = [kind for kind in kinds if kind not in ("linear_attention", "full_attention")]
    if unknown:
        raise CheckpointError(f"config.json: layers of this family are linear or full attention, not {unknown[0]!r}")
    return cast(tuple[LayerType, ...], tuple(kinds))
