"""OPT, the decoder of BLIP-2: its part of config.json, and its tensors' names.

Source: configuration_opt.py and modeling_opt.py of huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import BiasConfig, DecoderConfig, EmbeddingConfig, NormConfig, ScaleConfig
from mlx_vlm_mini.errors import CheckpointError

from .configs import MOST_LAYERS, activation

_OPT = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True,
}  # fmt: skip


def opt_decoder(hf: Mapping[str, Any]) -> DecoderConfig:
    """OPT from its part of config.json; sizes whose kind the larger ones are not (350m) are refused."""
    values = {**_OPT, **hf}
    width, layers = values["hidden_size"], values["num_hidden_layers"]
    for key, usual in (
        ("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True), ("enable_bias", True),
        ("_remove_final_layer_norm", False), ("word_embed_proj_dim", width),
    ):  # fmt: skip
        if values.get(key, usual) not in (usual, None):
            raise CheckpointError(f"config.json: OPT with {key} {values[key]!r} is not supported (known: {usual!r})")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise CheckpointError(f"config.json: a decoder of {layers} layers is not supported (at most {MOST_LAYERS})")
    return DecoderConfig(
        **{key: values[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{key: values[key] for key in ("max_position_embeddings", "tie_word_embeddings")},
        num_key_value_heads=values["num_attention_heads"],
        head_dim=width // values["num_attention_heads"],
        intermediate_size=values["ffn_dim"],
        hidden_act=activation(values["activation_function"]),
        norms=NormConfig(rms_norm_eps=1e-5, norm_type="layer_norm"),
        scales=ScaleConfig(),
        rope_theta=10000.0,
        rope_scaling=None,
        biases=BiasConfig(qkv_bias=True, o_bias=True, mlp_bias=True),
        layer_types=("full_attention",) * layers,
        window=None,
        two_way="nothing",
        mlp_type="plain",
        embeddings=EmbeddingConfig(learned_positions=2),  # which padding had
    )


def opt_weights(prefix: str) -> dict[str, str | None]:
    """Names of an OPT without its head."""
    layer, ours = prefix + "layers.{}.", "decoder.layers.{}."
    return {
        prefix + "embed_tokens": "decoder.embed_tokens",
        prefix + "embed_positions.weight": "decoder.pos_embed",
        prefix + "final_layer_norm": "decoder.norm",
        **{f"{layer}self_attn.{each}_proj": f"{ours}self_attn.{each}_proj" for each in "qkv"},
        layer + "self_attn.out_proj": ours + "self_attn.o_proj",
        layer + "self_attn_layer_norm": ours + "input_layernorm",
        layer + "final_layer_norm": ours + "post_attention_layernorm",
        layer + "fc1": ours + "mlp.fc1",
        layer + "fc2": ours + "mlp.fc2",
    }
