"""What the sizes of Gemma 4 share: their decoder, the names of its tensors, and how a picture stands in a prompt.

Source: models/gemma4 and models/gemma4_unified of huggingface/transformers; config.json files as they are on the Hub.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from mlx_vlm_mini.config import (
    DecoderConfig,
    EmbeddingConfig,
    ExpertConfig,
    LayerShape,
    LayerType,
    NormConfig,
    PerLayerConfig,
    TwoWay,
    VLMConfig,
    WindowConfig,
)
from mlx_vlm_mini.decoder.rope import rope_type
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.preprocessing.settings import ImageSettings

from .configs import llama_weights, text_decoder
from .maps import Weights, stacked_experts
from .patch_grids import fitting_grid

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<|image|>' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}{% endif %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)

_TEXT: dict[str, Any] = {  # what the class defaults to
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
    "num_global_key_value_heads": None, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "sliding_window": 512, "final_logit_softcapping": None, "use_bidirectional_attention": None,
    "attention_k_eq_v": False, "attention_bias": False, "tie_word_embeddings": True,
    "enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144, "pad_token_id": 0,
}  # fmt: skip
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_LAYER = (
    "layer_scalar", "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2",
    "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm",
)  # fmt: skip
_ROUTER = {"proj": "gate", "scale": "scale", "per_expert_scale": "per_expert_scale"}
_PER_LAYER = {
    "embed_tokens_per_layer": "embed", "per_layer_model_projection": "projection", "per_layer_projection_norm": "norm",
}  # fmt: skip
_SHARED: Mapping[LayerType, LayerType] = {
    "full_attention": "shared_full_attention", "sliding_attention": "shared_sliding_attention",
}  # fmt: skip
_PATTERN = 6  # layers, of which the last one sees everything


def gemma4_weights() -> Weights:
    """Names of the decoder: those of the Hub and of transformers, and mlx-community's; what is heard is dropped."""
    names: dict[str, str | tuple[str, ...] | None] = {"lm_head": "decoder.lm_head"}
    for prefix in ("model.language_model.", "language_model.model."):
        names |= llama_weights(prefix)
        theirs, ours = prefix + "layers.{}.", "decoder.layers.{}."
        names |= {theirs + name: ours + name for name in _LAYER}
        names |= {f"{theirs}router.{name}": f"{ours}experts.{own}" for name, own in _ROUTER.items()}
        names |= stacked_experts(theirs + "experts.", theirs + "experts.switch_glu.", ours + "experts.switch_mlp.")
        names |= {prefix + name: f"decoder.per_layer.{own}" for name, own in _PER_LAYER.items()}
    return names | {f"{whole}{part}*": None for whole in ("model.", "") for part in ("audio_tower.", "embed_audio.")}


def gemma4_decoder(text: Mapping[str, Any], images: TwoWay, **defaults: Any) -> DecoderConfig:
    """The decoder of a text_config.

    Args:
        images: which later tokens an image's see where the config says "vision".
        defaults: the class's, where it is not gemma4's.

    Raises:
        CheckpointError: it is of a kind that is not supported.
    """
    values = {**_TEXT, **defaults, **text}
    plain, rope = _layer_types(values), values.get("rope_parameters") or _ROPE
    kinds, size = _with_shared(plain, values["num_kv_shared_layers"]), values["hidden_size_per_layer_input"]
    near, far = dict(rope.get("sliding_attention") or {}), dict(rope.get("full_attention") or {})
    if rope_type(near) != "default":
        raise CheckpointError(f"config.json: rope type '{rope_type(near)}' of sliding layers is not supported")
    if values["use_bidirectional_attention"] not in (None, "vision"):
        raise CheckpointError("config.json: a Gemma 4 whose tokens all see one another reads and does not write")
    if values["attention_bias"]:
        raise CheckpointError("config.json: attention_bias is not supported in a Gemma 4")
    far.setdefault("rope_theta", 1e6)
    base = text_decoder(
        {
            **{key: values[key] for key in _TEXT if key not in ("final_logit_softcapping", "sliding_window")},
            "model_type": "gemma2", "layer_types": plain, "sliding_window": values["sliding_window"],
            "rope_parameters": far, "query_pre_attn_scalar": 1.0, "attn_logit_softcapping": None,
            "final_logit_softcapping": values["final_logit_softcapping"],
        },
        proven=("gemma2",),
    )  # fmt: skip
    return replace(
        base,
        norms=NormConfig(
            rms_norm_eps=values["rms_norm_eps"], norm_type="rms_norm_float32", sandwich=True, qk_norm=True, v_norm=True
        ),
        scales=replace(base.scales, layer_scalars=True),
        window=WindowConfig(sliding_window=values["sliding_window"], sliding_rope_theta=near.get("rope_theta", 1e4)),
        layer_types=kinds,
        shapes=_shapes(values, plain, kinds),
        embeddings=EmbeddingConfig()
        if not size
        else EmbeddingConfig(
            per_layer=PerLayerConfig(
                size=size, vocab_size=values["vocab_size_per_layer_input"], pad_token_id=values["pad_token_id"]
            )
        ),
        **_experts(values),
        two_way=images if values["use_bidirectional_attention"] == "vision" else "nothing",
    )


def _layer_types(values: Mapping[str, Any]) -> tuple[LayerType, ...]:
    """As config.json lists them; without a list every sixth layer sees everything. The last one always does."""
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if (i + 1) % _PATTERN else "full_attention" for i in range(layers)]
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise CheckpointError(f"config.json: layers of a Gemma 4 slide or attend to all, not {unknown[0]!r}")
    return cast(tuple[LayerType, ...], (*kinds[:-1], "full_attention"))


def _with_shared(kinds: tuple[LayerType, ...], count: int) -> tuple[LayerType, ...]:
    """The last so many layers as ones that have keys and values of earlier ones.

    Raises:
        CheckpointError: there are no earlier ones.
    """
    if type(count) is not int or not 0 <= count < max(len(kinds), 1):
        raise CheckpointError(f"config.json: of {len(kinds)} layers {count!r} cannot share the others' keys")
    own = len(kinds) - count
    return kinds[:own] + tuple(_SHARED[kind] for kind in kinds[own:])


def _experts(values: Mapping[str, Any]) -> dict[str, Any]:
    if not values["enable_moe_block"]:
        return {}
    experts = ExpertConfig(
        num_experts=values["num_experts"],
        num_experts_per_tok=values["top_k_experts"],
        moe_intermediate_size=values["moe_intermediate_size"],
    )
    return {"mlp_type": "gated_and_moe", "experts": experts}


def _shapes(
    values: Mapping[str, Any], plain: tuple[LayerType, ...], kinds: tuple[LayerType, ...]
) -> dict[LayerType, LayerShape]:
    """The attention of each kind of layer: of full ones with a head size of its own and, where keys are values, fewer
    heads of these; or as `per_layer_config` says, which transformers 5.23 writes in place of both.

    Args:
        plain: the kinds of all layers, whether or not they share keys.

    Raises:
        CheckpointError: layers of one kind differ.
    """
    heads, same = values["num_attention_heads"], bool(values["attention_k_eq_v"])
    own = dict.fromkeys(plain, (values["num_key_value_heads"], values["head_dim"]))
    if values.get("per_layer_config") is None:
        fewer = values["num_global_key_value_heads"] if same else None
        own["full_attention"] = (fewer or values["num_key_value_heads"], values["global_head_dim"])
    else:
        own |= _written_by_layer(values, plain, own)
    found: dict[LayerType, LayerShape] = {}
    for kind in dict.fromkeys(kinds):
        source = next((each for each, shared in _SHARED.items() if shared == kind), None)
        kv_heads, head_dim = own[source or kind]
        found[kind] = LayerShape(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dims=head_dim,
            keys_as_values=same and (source or kind) == "full_attention",
            shared_with=source,
            mlp_width=2 * values["intermediate_size"] if source and values["use_double_wide_mlp"] else None,
        )
    return found


def _written_by_layer(
    values: Mapping[str, Any], kinds: tuple[LayerType, ...], usual: Mapping[LayerType, tuple[int, int]]
) -> dict[LayerType, tuple[int, int]]:
    found: dict[LayerType, tuple[int, int]] = {}
    for number, kind in enumerate(kinds):
        layer = values["per_layer_config"].get(str(number), {})
        shape = layer.get("num_key_value_heads", usual[kind][0]), layer.get("head_dim", usual[kind][1])
        if found.setdefault(kind, shape) != shape:
            raise CheckpointError(f"config.json: per_layer_config gives layer {number} another attention than others")
    return found


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return f"<|image>{image_token * fitting_grid(config, settings).count_tokens(size)}<image|>"
