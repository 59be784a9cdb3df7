"""The layers of decoders by kind."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.layers.activation import ACTIVATIONS
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.norms import OffsetRMSNorm
from mlx_vlm_mini.layers.types import Mask, Recorder

from .cross_attention import CrossAttention, ImageCache, ShownImage, Sight
from .query_attention import QueryAttention


def make_norm(config: DecoderConfig, width: int | None = None) -> nn.Module:
    """A norm of vectors of the hidden size, or of another width."""
    norms, width = config.norms, width or config.hidden_size
    if norms.rms_norm_offset:
        return OffsetRMSNorm(width, eps=norms.rms_norm_eps, offset=norms.rms_norm_offset)
    return nn.RMSNorm(width, eps=norms.rms_norm_eps)


class MLP(nn.Module):
    """The gated MLP of "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.biases.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.biases.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.biases.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=config.biases.qkv_bias,
            o_bias=config.biases.o_bias,
            scale=(config.scales.query_pre_attn_scalar or config.head_dim) ** -0.5,
            softcap=config.scales.attn_logit_softcapping,
            logn_length=config.scales.logn_length,
        )
        if config.norms.qk_norm:
            self.self_attn.q_norm = make_norm(config, config.head_dim)
            self.self_attn.k_norm = make_norm(config, config.head_dim)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, *, mask: Mask, rope: Any, cache: Any, attentions: Recorder | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask=mask, rope=rope, cache=cache, attentions=attentions)
        return x + self.mlp(self.post_attention_layernorm(x))


class SandwichLayer(DecoderLayer):
    """Gemma 2's layer: what attention and MLP give is normed, too.

    `post_attention_layernorm` stands behind the attention here, not in front of the MLP.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.pre_feedforward_layernorm = make_norm(config)
        self.post_feedforward_layernorm = make_norm(config)

    def __call__(self, x: mx.array, *, mask: Mask, rope: Any, cache: Any, attentions: Recorder | None) -> mx.array:
        y = self.self_attn(self.input_layernorm(x), mask=mask, rope=rope, cache=cache, attentions=attentions)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class QueryLayer(DecoderLayer):
    """QLLaMA's layer in which an image's query tokens, the first of all, look at its features."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.cross_attn = QueryAttention(config)

    def __call__(self, x: mx.array, *, mask: Any, rope: Any, cache: Any, attentions: Recorder | None) -> mx.array:
        """`mask` is a QuerySight."""
        x = x + self.self_attn(self.input_layernorm(x), mask=mask.mask, rope=rope, cache=cache, attentions=attentions)
        if mask.features is not None:
            x = self.cross_attn(x, mask.features, mask.looks)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossAttentionLayer(nn.Module):
    """A layer that looks at images: what its attention and its MLP add is multiplied by tanh of a gate.

    Tokens that see no image leave it as they entered. `zero_blind` false is what transformers computes, which spares
    them the MLP alone: they attend to all images.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.cross_attention is not None
        self.zero_blind = config.cross_attention.blind_rows == "zero"
        self.input_layernorm = make_norm(config)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = mx.zeros(1)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.cross_attn_mlp_gate = mx.zeros(1)

    def show(self, images: Sequence[ShownImage], cache: ImageCache) -> None:
        """Put keys and values of images behind those of the images before them."""
        features = mx.concatenate([image.features for image in images])[None]
        cache.add([image.span for image in images], *self.cross_attn.keys_values(features))

    def __call__(
        self, x: mx.array, *, mask: Sight | None, rope: Any, cache: Any, attentions: Recorder | None
    ) -> mx.array:
        """`cache` is an ImageCache; images have no positions, and `rope` is not used."""
        if mask is None:
            if attentions is not None:
                attentions.append(mx.zeros((x.shape[0], self.cross_attn.num_heads, x.shape[1], 0)))
            return x
        y = self.cross_attn(self.input_layernorm(x), sight=mask, cache=cache, attentions=attentions)
        if self.zero_blind and mask.sees is not None:
            y = y * mask.sees
        x = x + mx.tanh(self.cross_attn_attn_gate) * y
        y = self.mlp(self.post_attention_layernorm(x))
        if mask.sees is not None:
            y = y * mask.sees
        return x + mx.tanh(self.cross_attn_mlp_gate) * y
