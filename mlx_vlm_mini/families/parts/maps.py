"""Weight maps: what a checkpoint's tensors are called here, and how fused ones are cut; those of InternVL's parts.

Source: modeling_intern_vit.py, modeling_internlm2.py and modeling_phi3.py of OpenGVLab/InternVL; models/internvl of
huggingface/transformers.
"""

from collections.abc import Mapping


class PerHead(tuple[str, ...]):
    """A tuple of a map whose tensor holds, for each key and value head, its queries, its key and its value; in a vision
    tower for each head."""

    __slots__ = ()


class Raised(str):
    """A name of a map whose tensor is stored with 1 added: of a norm that adds 1 itself."""

    __slots__ = ()


class Experts(tuple[str, ...]):
    """A tuple of a map whose tensor holds all experts: (experts, out, in), or (experts, in, out) as some repositories
    have it. What is written of it in MLX's format, packed, has its name as a module's."""

    __slots__ = ()


Weights = Mapping[str, str | tuple[str, ...] | None]
"""A checkpoint's names, of tensors or whole modules, to ours.

`{}` is a layer number. None drops on purpose; where a key ends in `*`, all that begins so. A tuple cuts a fused tensor
by rows, for each module as many as it has.
"""

_ATTENTION = "decoder.layers.{}.self_attn."
_MLP = "decoder.layers.{}.mlp."
_GATED = ("gate_proj", "up_proj", "down_proj")
_QKV = (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj")


def expert_weights(prefix: str) -> Weights:
    """Feed-forwards of experts: fused, one by one, and stacked as mlx-lm has them; `{}.{}` numbers one of a stack."""
    theirs = prefix + "layers.{}.mlp."
    return {
        theirs + "gate": _MLP + "gate",
        **stacked_experts(theirs + "experts.", theirs + "switch_mlp.", _MLP + "switch_mlp."),
        **{f"{theirs}shared_expert.{part}": f"{_MLP}shared_expert.{part}" for part in _GATED},
        theirs + "shared_expert_gate": _MLP + "shared_expert_gate",
    }


def stacked_experts(whole: str, stacked: str, ours: str) -> Weights:
    """Experts fused and one by one, which stand below `whole`, and `stacked`, each named so."""
    return {
        whole + "gate_up_proj": Experts((ours + "gate_proj", ours + "up_proj")),
        whole + "down_proj": Experts((ours + "down_proj",)),
        **{f"{whole}{{}}.{part}": f"{ours}{{}}.{part}" for part in _GATED},
        **{stacked + part: ours + part for part in _GATED},
    }


def intern_vit(prefix: str) -> Weights:
    """An InternViT as its authors write it, queries, keys and values fused."""
    block, ours = prefix + "encoder.layers.{}.", "vision.blocks.{}."
    return {
        prefix + "embeddings.class_embedding": "vision.class_token",
        prefix + "embeddings.position_embedding": "vision.pos_embed",
        prefix + "embeddings.patch_embedding": "vision.patch_embed",
        block + "attn.qkv": (ours + "attn.q_proj", ours + "attn.k_proj", ours + "attn.v_proj"),
        block + "attn.proj": ours + "attn.o_proj",
        block + "attn.q_norm": ours + "attn.q_norm",
        block + "attn.k_norm": ours + "attn.k_norm",
        **{block + name: ours + name for name in ("norm1", "norm2", "ls1", "ls2", "mlp.fc1", "mlp.fc2")},
    }


def native_intern_vit(prefix: str, *, layers: str = "encoder.layer") -> Weights:
    """An InternViT as transformers writes it; `layers`: where its blocks are."""
    block, ours = f"{prefix}{layers}.{{}}.", "vision.blocks.{}."
    modules = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
    return {
        prefix + "embeddings.cls_token": "vision.class_token",
        prefix + "embeddings.mask_token": None,
        prefix + "embeddings.position_embeddings": "vision.pos_embed",
        prefix + "embeddings.patch_embeddings.projection": "vision.patch_embed",
        prefix + "layernorm": "vision.norm",
        **{block + "attention." + name: ours + "attn." + name for name in modules},
        block + "attention.projection_layer": ours + "attn.o_proj",
        block + "layernorm_before": ours + "norm1",
        block + "layernorm_after": ours + "norm2",
        block + "lambda_1": ours + "ls1",
        block + "lambda_2": ours + "ls2",
        block + "mlp.fc1": ours + "mlp.fc1",
        block + "mlp.fc2": ours + "mlp.fc2",
    }


def phi3(prefix: str) -> Weights:
    """What Phi-3 fuses; else its names are Llama's."""
    return {
        prefix + "layers.{}.self_attn.qkv_proj": _QKV,
        prefix + "layers.{}.mlp.gate_up_proj": (_MLP + "gate_proj", _MLP + "up_proj"),
    }


def internlm2(prefix: str) -> Weights:
    """InternLM2's names behind those that are Llama's."""
    layer = prefix + "layers.{}."
    return {
        prefix + "tok_embeddings": "decoder.embed_tokens",
        layer + "attention.wqkv": PerHead(_QKV),
        layer + "attention.wo": _ATTENTION + "o_proj",
        layer + "feed_forward.w1": _MLP + "gate_proj",
        layer + "feed_forward.w2": _MLP + "down_proj",
        layer + "feed_forward.w3": _MLP + "up_proj",
        layer + "attention_norm": "decoder.layers.{}.input_layernorm",
        layer + "ffn_norm": "decoder.layers.{}.post_attention_layernorm",
        layer + "attention.rotary_emb.inv_freq": None,
    }


def mllama_vision(prefix: str) -> Weights:
    """Llama 3.2 Vision's tower."""
    names = {
        prefix + "class_embedding": "vision.class_token",
        prefix + "patch_embedding": "vision.patch_embed",
        prefix + "gated_positional_embedding.embedding": "vision.pos_embed",
        prefix + "gated_positional_embedding.gate": "vision.tile_pos.gate",
        prefix + "gated_positional_embedding.tile_embedding": "vision.tile_pos.embedding",
        prefix + "layernorm_pre": "vision.norm_pre",
        prefix + "layernorm_post": "vision.norm",
    }
    for where in ("pre", "post"):
        theirs = f"{prefix}{where}_tile_positional_embedding."
        names |= {theirs + "embedding": f"vision.{where}_tile.embedding", theirs + "gate": f"vision.{where}_tile.gate"}
    for theirs, ours in (("transformer", "blocks"), ("global_transformer", "global_blocks")):
        theirs, ours = f"{prefix}{theirs}.layers.{{}}.", f"vision.{ours}.{{}}."
        names |= {
            theirs + f"self_attn.{name}": ours + f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        names |= {
            theirs + "input_layernorm": ours + "norm1",
            theirs + "post_attention_layernorm": ours + "norm2",
            theirs + "mlp.fc1": ours + "mlp.fc1",
            theirs + "mlp.fc2": ours + "mlp.fc2",
        }
        if "global" in theirs:
            names |= {theirs + "gate_attn": ours + "gate_attn", theirs + "gate_ffn": ours + "gate_mlp"}
    return names


def mllama_decoder(prefix: str) -> Weights:
    """What Llama 3.2 Vision's cross-attention layers have and Llama's layers have not."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    names = [*(f"cross_attn.{module}" for module in modules), "cross_attn_attn_gate", "cross_attn_mlp_gate"]
    return {f"{prefix}layers.{{}}.{name}": "decoder.layers.{}." + name for name in names}


def qwen_vision(prefix: str) -> Weights:
    """Qwen-VL's tower, queries, keys and values of each head together, and its resampler."""
    block, ours, pool = prefix + "transformer.resblocks.{}.", "vision.blocks.{}.", prefix + "attn_pool."
    return {
        prefix + "positional_embedding": "vision.pos_embed",
        prefix + "conv1": "vision.patch_embed",
        prefix + "ln_pre": "vision.norm_pre",
        block + "ln_1": ours + "norm1",
        block + "attn.in_proj": PerHead(ours + f"attn.{name}_proj" for name in "qkv"),
        block + "attn.out_proj": ours + "attn.o_proj",
        block + "ln_2": ours + "norm2",
        block + "mlp.c_fc": ours + "mlp.fc1",
        block + "mlp.c_proj": ours + "mlp.fc2",
        **{pool + name: "projector." + name for name in ("query", "pos_embed", "kv_proj", "ln_q", "ln_kv")},
        **{f"{pool}attn.{name}": f"projector.attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj")},
        prefix + "ln_post": "projector.ln_post",
        prefix + "proj": "projector.proj",
    }


def qwen_decoder(prefix: str) -> Weights:
    """The first Qwen, without its head."""
    layer, ours = prefix + "h.{}.", "decoder.layers.{}."
    return {
        prefix + "wte": "decoder.embed_tokens",
        prefix + "ln_f": "decoder.norm",
        layer + "ln_1": ours + "input_layernorm",
        layer + "attn.c_attn": _QKV,
        layer + "attn.c_proj": _ATTENTION + "o_proj",
        layer + "attn.rotary_emb.inv_freq": None,
        prefix + "rotary_emb.inv_freq": None,
        layer + "ln_2": ours + "post_attention_layernorm",
        layer + "mlp.w1": _MLP + "up_proj",
        layer + "mlp.w2": _MLP + "gate_proj",
        layer + "mlp.c_proj": _MLP + "down_proj",
    }
