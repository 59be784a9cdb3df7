"""Parts that several families are composed of: their configs with class defaults, and their tensors' names.

Source: configuration_*.py and modeling_*.py of clip, siglip, llama, mistral, qwen2, gemma, gemma2, llava and llava_next
in huggingface/transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from mlx_vlm_mini.config import (
    Activation,
    BiasConfig,
    BlockConfig,
    DecoderConfig,
    LayerType,
    NormConfig,
    ProjectorConfig,
    QueryScale,
    ScaleConfig,
    TwoWay,
    VisionConfig,
    VLMConfig,
    WindowConfig,
)
from mlx_vlm_mini.decoder.rope import rope_type
from mlx_vlm_mini.errors import CheckpointError

_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP = {**_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWERS: dict[str, tuple[dict[str, Any], bool]] = {  # defaults, and whether it is of CLIP's form
    "clip_vision_model": (_CLIP, True),
    "siglip_vision_model": (_SIGLIP, False),
}

MOST_LAYERS = 10_000  # far above every model's; what is made for each layer must fit into memory

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_MISTRAL = {
    **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip
_MINISTRAL3: dict[str, Any] = {
    **_LLAMA, "vocab_size": 131072, "intermediate_size": 14336, "num_hidden_layers": 34, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
_QWEN2 = {
    **_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_QWEN3 = {**_QWEN2, "head_dim": 128}
_PHI3 = {
    **_LLAMA, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip
_INTERNLM2 = {**_LLAMA, "vocab_size": 103168, "bias": True}
_GEMMA = {
    **_LLAMA, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = {
    **_GEMMA, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
_GEMMA3 = {
    **_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}  # fmt: skip
_MLLAMA = {
    **_LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
_GEMMA2_SCALES = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_DECODERS = {
    "llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3, "phi3": _PHI3, "internlm2": _INTERNLM2,
    "gemma": _GEMMA, "gemma2": _GEMMA2, "gemma3_text": _GEMMA3, "mllama_text_model": _MLLAMA, "ministral3": _MINISTRAL3,
}  # fmt: skip
_BIAS_KEYS = {  # what says whether queries, keys, values and their output have biases
    "llama": "attention_bias", "qwen3": "attention_bias", "gemma": "attention_bias", "gemma2": "attention_bias",
    "gemma3_text": "attention_bias",
    "internlm2": "bias",
}  # fmt: skip
_SAME_ACTIVATION = {
    "swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "gelu_python": "gelu",
}  # fmt: skip


def activation(name: str) -> Activation:
    """A config's activation name, checked; other names of the same function are translated."""
    name = _SAME_ACTIVATION.get(name, name)
    if name not in get_args(Activation):
        known = ", ".join(sorted(get_args(Activation)))
        raise CheckpointError(f"config.json: activation '{name}' is not supported (known: {known})")
    return cast(Activation, name)


def vision_tower(
    hf: Mapping[str, Any], *, feature_layers: int | list[int], drop_first_feature: bool, post_norm: bool = False
) -> VisionConfig:
    """A CLIP or SigLIP tower from its part of config.json; `feature_layers` may count from the end."""
    model_type = hf.get("model_type", "clip_vision_model")
    if model_type not in _TOWERS:
        known = ", ".join(sorted(_TOWERS))
        raise CheckpointError(f"config.json: vision tower '{model_type}' is not supported (known: {known})")
    defaults, clip = _TOWERS[model_type]
    values = {**defaults, **hf}
    depth = values["num_hidden_layers"]
    layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_hidden_layers=depth,
        num_attention_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        image_size=side(values["image_size"], "image_size"),
        patch_size=side(values["patch_size"], "patch_size"),
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=values["layer_norm_eps"],
        blocks=BlockConfig(),
        class_token=clip,
        patch_bias=not clip,
        pre_norm=clip,
        post_norm=post_norm,
        feature_layers=tuple(from_start(layer, depth) for layer in layers),
        drop_first_feature=drop_first_feature,
        resample_positions=False,
    )


def from_start(layer: int, depth: int) -> int:
    """A layer's number where it may count from the end of `depth` layers; 0 is what enters the first."""
    return layer + depth + 1 if -depth - 1 <= layer < 0 else layer


def side(size: Any, name: str) -> int:
    """A square's side, which configs also write as [height, width]."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"config.json: {name} must be square, not {size}")
    return cast(int, sides.pop())


def text_decoder(
    hf: Mapping[str, Any],
    *,
    proven: Sequence[str] = ("llama", "mistral", "qwen2"),
    tie_word_embeddings: bool = False,
    two_way: TwoWay = "nothing",
) -> DecoderConfig:
    """A decoder from its part of config.json, of a kind that the family is proven with."""
    model_type = hf.get("model_type", "llama")
    if model_type not in proven:
        raise CheckpointError(f"config.json: decoder '{model_type}' is not supported (known: {', '.join(proven)})")
    values = {**_DECODERS[model_type], **hf}
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise CheckpointError(f"config.json: a decoder of {layers} layers is not supported (at most {MOST_LAYERS})")
    rope = _rope(values)
    if model_type != "ministral3":
        rope.pop("llama_4_scaling_beta", None)  # which no other reads
    theta = rope.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
    layer_types = _layer_types(model_type, values)
    sliding = "sliding_attention" in layer_types
    biased = model_type in _BIAS_KEYS and values[_BIAS_KEYS[model_type]]
    sandwich = model_type in ("gemma2", "gemma3_text")
    gemma = model_type == "gemma" or sandwich
    act = values["hidden_activation"] if sandwich else values["hidden_act"]
    if gemma and act == "gelu":  # what old configs wrote, and the weights were trained with the other
        act = "gelu_pytorch_tanh"
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or values["hidden_size"] // heads,
        intermediate_size=values["intermediate_size"],
        hidden_act=activation(act),
        norms=NormConfig(
            rms_norm_eps=values["rms_norm_eps"],
            rms_norm_offset=1.0 if gemma else 0.0,
            sandwich=sandwich,
            qk_norm=model_type in ("qwen3", "gemma3_text"),
        ),
        scales=ScaleConfig(
            embed_scale=values["hidden_size"] ** 0.5 if gemma else 1.0,
            fits_float16=not gemma,
            query_scale=_query_scale(rope),
            **({key: values[key] for key in _GEMMA2_SCALES} if sandwich else {}),
        ),
        max_position_embeddings=values["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=rope or None,
        biases=BiasConfig(
            qkv_bias=model_type == "qwen2" or biased,
            o_bias=biased,
            mlp_bias=model_type == "llama" and values["mlp_bias"],
        ),
        layer_types=layer_types,
        window=WindowConfig(sliding_window=values["sliding_window"]) if sliding else None,
        tie_word_embeddings=tie_word_embeddings or values["tie_word_embeddings"],
        two_way=two_way,
    )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope scaling, with what some configs write beside it (Phi-3's original length)."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    original = values.get("original_max_position_embeddings")
    if original is not None and rope_type(rope) in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = original
    if values.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    return rope


def _query_scale(rope: Mapping[str, Any]) -> QueryScale | None:
    beta = rope.get("llama_4_scaling_beta")
    if not beta:
        return None
    return QueryScale(kind="log_steps", length=rope["original_max_position_embeddings"], beta=beta)


def _layer_types(model_type: str, values: Mapping[str, Any]) -> tuple[LayerType, ...]:
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    if model_type in ("mistral", "ministral3", "phi3") and window is not None:
        return ("sliding_attention",) * layers
    if model_type == "gemma3_text":
        return tuple(values["layer_types"])
    if model_type == "gemma2" and window is not None:
        if values["layer_types"] is not None:
            return tuple(values["layer_types"])
        return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))
    if model_type in ("qwen2", "qwen3") and values["use_sliding_window"] and window is not None:
        if values["layer_types"] is not None:
            return tuple(values["layer_types"])
        first = values["max_window_layers"]
        return tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))
    return ("full_attention",) * layers


def clip_weights(prefix: str, *, post_norm: bool = False) -> dict[str, str | None]:
    """Names of a CLIP or SigLIP tower; what no VLM reads is dropped, without `post_norm` the last norm, too."""
    block = prefix + "encoder.layers.{}."
    return {
        prefix + "embeddings.class_embedding": "vision.class_token",
        prefix + "embeddings.patch_embedding": "vision.patch_embed",
        prefix + "embeddings.position_embedding.weight": "vision.pos_embed",
        prefix + "embeddings.position_ids": None,
        prefix + "pre_layrnorm": "vision.norm_pre",
        block + "layer_norm1": "vision.blocks.{}.norm1",
        block + "self_attn.q_proj": "vision.blocks.{}.attn.q_proj",
        block + "self_attn.k_proj": "vision.blocks.{}.attn.k_proj",
        block + "self_attn.v_proj": "vision.blocks.{}.attn.v_proj",
        block + "self_attn.out_proj": "vision.blocks.{}.attn.o_proj",
        block + "layer_norm2": "vision.blocks.{}.norm2",
        block + "mlp.fc1": "vision.blocks.{}.mlp.fc1",
        block + "mlp.fc2": "vision.blocks.{}.mlp.fc2",
        prefix + "post_layernorm": "vision.norm" if post_norm else None,
        prefix + "head.probe": None,
        prefix + "head.attention.in_proj_weight": None,
        prefix + "head.attention.in_proj_bias": None,
        prefix + "head.attention.out_proj": None,
        prefix + "head.layernorm": None,
        prefix + "head.mlp.fc1": None,
        prefix + "head.mlp.fc2": None,
    }


_LAYER_MODULES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


def llama_weights(prefix: str) -> dict[str, str | None]:
    """Names of a Llama, Mistral, Qwen or Gemma decoder without its head: ours are the same behind the prefix."""
    names: dict[str, str | None] = {prefix + name: f"decoder.{name}" for name in ("embed_tokens", "norm")}
    names |= {prefix + "layers.{}." + name: "decoder.layers.{}." + name for name in _LAYER_MODULES}
    names[prefix + "layers.{}.self_attn.rotary_emb.inv_freq"] = None
    names[prefix + "rotary_emb.inv_freq"] = None
    return names


_LLAVA_VISION = {  # of a config without vision_config: CLIP-L/14 at 336 pixels
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def vlm_weights(*projector: str, post_norm: bool = False) -> dict[str, str | None]:
    """Names of a whole model in all layouts: the Hub's files, transformers since 4.52 in memory, what 5 writes.

    Args:
        projector: names of the projector's linear layers, in order.
        post_norm: whether the vision tower's last norm is read.
    """
    names: dict[str, str | None] = {}
    for prefix in (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    ):
        names |= clip_weights(prefix, post_norm=post_norm)
    for prefix in ("multi_modal_projector.", "model.multi_modal_projector."):
        names |= {prefix + name: f"projector.layers.{i}" for i, name in enumerate(projector)}
    for prefix in ("language_model.model.", "language_model.", "model.language_model."):
        names |= llama_weights(prefix)
    return names | {"language_model.lm_head": "decoder.lm_head", "lm_head": "decoder.lm_head"}


LLAVA_WEIGHTS: Mapping[str, str | None] = vlm_weights("linear_1", "linear_2")


def llava_config(hf: Mapping[str, Any], family: str) -> VLMConfig:
    """config.json of a LLaVA: CLIP or SigLIP, an MLP of two layers, and Llama, Mistral or Qwen2."""
    text, vision = hf.get("text_config") or {}, hf.get("vision_config")
    strategy = hf.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy '{strategy}' is neither 'default' nor 'full'"
        )
    decoder = text_decoder(text, tie_word_embeddings=hf.get("tie_word_embeddings", False))
    tower = vision_tower(
        _LLAVA_VISION if vision is None else vision,
        feature_layers=hf.get("vision_feature_layer", -2),
        drop_first_feature=strategy == "default",
    )
    return VLMConfig(
        family=family,
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers={"mlp": 2, "linear": 1}[hf.get("projector_type", "mlp")],  # the key is ours, of `compose`
            hidden_act=activation(hf.get("projector_hidden_act", "gelu")),
            bias=hf.get("multimodal_projector_bias", True),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 32000)),
        image_grid_pinpoints=None,
    )
