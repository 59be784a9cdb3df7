"""The layers of decoders by kind: `LAYERS` says which class a kind is, `MLPS` which feed-forward.

A layer turns float[B, L, C] into float[B, L, C] by what a `Pass` has prepared for its kind.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DecoderConfig, ExpertConfig, LayerType, MLPType
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.experts import MoE, ScaledMoE
from mlx_vlm_mini.layers.kernels import activation
from mlx_vlm_mini.layers.mlp import MLP, GatedMLP, PerLayerEmbedding
from mlx_vlm_mini.layers.norms import NORMS, BareRMSNorm, OffsetRMSNorm

from .cross_attention import CrossAttention, ImageCache, ImageRows, Sight, look
from .delta import DeltaCache, GatedDeltaNet
from .query_attention import QueryAttention
from .reading import Pass
from .state import NoCache


def _gated(config: DecoderConfig, kind: LayerType) -> GatedMLP:
    return GatedMLP(config.hidden_size, config.mlp_width(kind), config.hidden_act, bias=config.biases.mlp_bias)


MLPS: dict[MLPType, Callable[[DecoderConfig, LayerType], nn.Module]] = {
    "gated": _gated,
    "gated_and_moe": _gated,  # the experts are the layer's
    "plain": lambda config, kind: MLP(config.hidden_size, config.mlp_width(kind), config.hidden_act),
    "moe": lambda config, kind: MoE(config.hidden_size, cast(ExpertConfig, config.experts), config.hidden_act),
}


def make_norm(config: DecoderConfig, width: int | None = None) -> nn.Module:
    """A norm of vectors of the hidden size, or of another width."""
    norms, width = config.norms, width or config.hidden_size
    if norms.rms_norm_offset:
        return OffsetRMSNorm(width, eps=norms.rms_norm_eps, offset=norms.rms_norm_offset)
    return NORMS[norms.norm_type](width, eps=norms.rms_norm_eps)


class StreamLayer(nn.Module):
    """What all layers have in common."""

    def join(self, x: mx.array, beside: mx.array | None) -> mx.array:
        """What leaves the layer, float[B, L, C], with what stands beside the tokens for it: by default added."""
        return x if beside is None else x + beside.astype(x.dtype)


class DecoderLayer(StreamLayer):
    """Self-attention and a feed-forward, each normed before and added to the stream."""

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__()
        self.kind = kind
        shape = config.shape(kind)
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            qkv_bias=config.biases.qkv_bias,
            o_bias=config.biases.o_bias,
            scale=(config.scales.query_pre_attn_scalar or shape.head_dim) ** -0.5,
            softcap=config.scales.attn_logit_softcapping,
            gated=shape.gated,
            keys_as_values=shape.keys_as_values,
            shared=shape.shared_with is not None,
        )
        self.shared_with = shape.shared_with
        self.lends = any(config.shape(other).shared_with == kind for other in dict.fromkeys(config.layer_types))
        if config.norms.qk_norm:
            self.self_attn.q_norm = make_norm(config, shape.head_dim)
        if config.norms.qk_norm and shape.shared_with is None:
            self.self_attn.k_norm = make_norm(config, shape.head_dim)
        if config.norms.v_norm:
            self.self_attn.v_norm = BareRMSNorm(eps=config.norms.rms_norm_eps)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLPS[config.mlp_type](config, kind)
        self.residual_scale = config.scales.residual_scale

    @classmethod
    def mask(cls, config: DecoderConfig, kind: LayerType, run: Pass) -> Any:
        """What layers of this kind may look at in a pass: a `Mask`."""
        return run.visible.mask(config.window_of(kind), run.rows)

    def make_cache(self, make: Callable[[], Any]) -> Any:
        """An empty cache for this layer; `make` gives one for keys and values of text."""
        return make() if self.shared_with is None else NoCache()

    def attend(self, x: mx.array, run: Pass, cache: Any) -> mx.array:
        """Self-attention of what is normed already: float[B, L, C] -> float[B, L, C]."""
        y: mx.array = self.self_attn(
            x,
            mask=run.masks[self.kind],
            rope=run.ropes.get(self.kind),
            sharpness=run.sharpness,
            memory=None if self.shared_with is None else run.shared[self.shared_with],
            cache=cache if self.shared_with is None else None,
            lend=partial(run.shared.__setitem__, self.kind) if self.lends else None,
            attentions=run.attentions,
        )
        return y

    def __call__(self, x: mx.array, run: Pass, cache: Any) -> mx.array:
        x = x + self._scaled(self.attend(self.input_layernorm(x), run, cache))
        return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))

    def _scaled(self, added: mx.array) -> mx.array:
        return added if self.residual_scale == 1 else added * self.residual_scale


class SandwichLayer(DecoderLayer):
    """Gemma 2's layer: what attention and MLP give is normed, too.

    `post_attention_layernorm` stands after the attention here, not before the MLP.
    """

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__(config, kind)
        self.pre_feedforward_layernorm = make_norm(config)
        self.post_feedforward_layernorm = make_norm(config)

    def __call__(self, x: mx.array, run: Pass, cache: Any) -> mx.array:
        x = x + self.post_attention_layernorm(self.attend(self.input_layernorm(x), run, cache))
        return x + self.feed_forward(x)

    def feed_forward(self, x: mx.array) -> mx.array:
        """What is added to the stream, float[B, L, C]."""
        y: mx.array = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return y


class ScaledLayer(SandwichLayer):
    """Gemma 4's layer: what leaves it is multiplied by a number, last of all.

    Where the config has embeddings for single layers, a gate of the stream lets some of the token's own in before that;
    and where it has experts, they read the stream beside the MLP, each normed for itself before and after.
    """

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__(config, kind)
        self.layer_scalar = mx.ones(1)
        size, act = config.hidden_size, config.hidden_act
        if (per_layer := config.embeddings.per_layer) is not None:
            self.act = activation(act)
            self.per_layer_input_gate = nn.Linear(size, per_layer.size, bias=False)
            self.per_layer_projection = nn.Linear(per_layer.size, size, bias=False)
            self.post_per_layer_input_norm = make_norm(config)
        if config.mlp_type == "gated_and_moe":
            assert config.experts is not None
            self.experts = ScaledMoE(size, config.experts, act, eps=config.norms.rms_norm_eps)
            self.post_feedforward_layernorm_1 = make_norm(config)
            self.pre_feedforward_layernorm_2 = make_norm(config)
            self.post_feedforward_layernorm_2 = make_norm(config)

    def feed_forward(self, x: mx.array) -> mx.array:
        """See `SandwichLayer`; the router reads the stream as it is."""
        if "experts" not in self:
            return super().feed_forward(x)
        own = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        chosen = self.post_feedforward_layernorm_2(self.experts(self.pre_feedforward_layernorm_2(x), x))
        y: mx.array = self.post_feedforward_layernorm(own + chosen)
        return y

    def join(self, x: mx.array, beside: mx.array | None) -> mx.array:
        """`beside`: float[B, L, size], the token's embedding for this layer."""
        if beside is not None:
            y = self.per_layer_projection(self.act(self.per_layer_input_gate(x)) * beside)
            x = x + self.post_per_layer_input_norm(y)
        return x * self.layer_scalar


class PerLayerInputs(nn.Module):
    """What each layer is given of each token besides the stream: of its id, and of what enters the first layer.

    Source: models/gemma4 of huggingface/transformers.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        per_layer = config.embeddings.per_layer
        assert per_layer is not None
        self.size, self.layers = per_layer.size, config.num_hidden_layers
        self.embed = PerLayerEmbedding(per_layer.vocab_size, self.layers * self.size)
        self.projection = nn.Linear(config.hidden_size, self.layers * self.size, bias=False)
        self.norm = make_norm(config, self.size)

    def __call__(self, token_ids: mx.array, embeddings: mx.array) -> tuple[mx.array, ...]:
        """int[B, L] and float[B, L, C] -> float[B, L, size] a layer."""
        shape, dtype = (*token_ids.shape, self.layers, self.size), embeddings.dtype
        own = self.embed(token_ids).astype(dtype) * mx.array(self.size**0.5, dtype=dtype)
        read = self.projection(embeddings) * embeddings.shape[-1] ** -0.5
        found = (self.norm(read.reshape(shape)) + own.reshape(shape)) * 2**-0.5
        return tuple(found[:, :, number] for number in range(self.layers))


class QueryLayer(DecoderLayer):
    """QLLaMA's layer in which an image's query tokens, the first of all, attend to its features."""

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__(config, kind)
        self.cross_attn = QueryAttention(config)

    def __call__(self, x: mx.array, run: Pass, cache: Any) -> mx.array:
        x = x + self.attend(self.input_layernorm(x), run, cache)
        memory = run.reading.memory
        if memory is not None:
            x = self.cross_attn.look(x, memory.features[None], memory.looks)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossAttentionLayer(StreamLayer):
    """A layer that attends to images: what its attention and its MLP add is multiplied by tanh of a gate.

    Tokens that see no image leave it as they entered. `zero_blind` false is what transformers computes, which spares
    them the MLP alone: they attend to all images.
    """

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__()
        assert config.cross_attention is not None
        self.kind = kind
        self.zero_blind = config.cross_attention.blind_rows == "zero"
        self.input_layernorm = make_norm(config)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = mx.zeros(1)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLPS[config.mlp_type](config, kind)
        self.cross_attn_mlp_gate = mx.zeros(1)

    @classmethod
    def mask(cls, config: DecoderConfig, kind: LayerType, run: Pass) -> Sight | None:
        """What the tokens of a pass see of the images; None where that is nothing."""
        if not run.spans:
            return None
        assert config.cross_attention is not None
        blind_attend = config.cross_attention.blind_rows == "attend"
        whole = run.attentions is not None
        return look(run.spans, run.rows.length, run.rows.start, blind_attend=blind_attend, whole=whole)

    def make_cache(self, make: Callable[[], Any]) -> ImageCache:
        """An empty cache of images."""
        return ImageCache()

    def __call__(self, x: mx.array, run: Pass, cache: ImageCache | ImageRows | None) -> mx.array:
        cache = ImageCache() if cache is None else cache
        is_batch = isinstance(cache, ImageRows)
        sight: Sight | None = cache.sight if isinstance(cache, ImageRows) else run.masks[self.kind]
        memory = run.reading.memory
        if memory is not None and isinstance(cache, ImageCache):
            cache.add(*self.cross_attn.keys_values(memory.features[None]))
        if sight is None:
            if run.attentions is not None:
                run.attentions.append(mx.zeros((x.shape[0], self.cross_attn.num_heads, x.shape[1], 0)))
            return x
        y = self.cross_attn.look(self.input_layernorm(x), sight, cache, run.attentions)
        if (self.zero_blind or is_batch) and sight.sees is not None:
            y = y * sight.sees
        x = x + mx.tanh(self.cross_attn_attn_gate) * y
        y = self.mlp(self.post_attention_layernorm(x))
        if sight.sees is not None:
            y = y * sight.sees
        return x + mx.tanh(self.cross_attn_mlp_gate) * y


class LinearLayer(StreamLayer):
    """A gated delta net and a feed-forward, each normed before and added to the stream."""

    def __init__(self, config: DecoderConfig, kind: LayerType) -> None:
        super().__init__()
        assert config.delta is not None
        self.kind = kind
        self.num_heads = config.num_attention_heads
        self.input_layernorm = make_norm(config)
        self.linear_attn = GatedDeltaNet(config.hidden_size, config.delta, config.norms.rms_norm_eps)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLPS[config.mlp_type](config, kind)

    @classmethod
    def mask(cls, config: DecoderConfig, kind: LayerType, run: Pass) -> None:
        """A recurrence sees what stands before a token, and needs no mask."""

    def make_cache(self, make: Callable[[], Any]) -> DeltaCache:
        """An empty state."""
        return DeltaCache()

    def __call__(self, x: mx.array, run: Pass, cache: DeltaCache | None) -> mx.array:
        if run.attentions is not None:  # whoever records counts layers, and here are no keys
            run.attentions.append(mx.zeros((x.shape[0], self.num_heads, x.shape[1], 0)))
        x = x + self.linear_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


Layer = DecoderLayer | CrossAttentionLayer | LinearLayer

LAYERS: dict[LayerType, type[Layer]] = {
    "full_attention": DecoderLayer,
    "sliding_attention": DecoderLayer,
    "shared_full_attention": DecoderLayer,
    "shared_sliding_attention": DecoderLayer,
    "query_attention": QueryLayer,
    "cross_attention": CrossAttentionLayer,
    "linear_attention": LinearLayer,
}


def layer_class(config: DecoderConfig, kind: LayerType) -> type[Layer]:
    """The class of a kind of layer in a decoder of this config."""
    found = LAYERS[kind]
    if found is DecoderLayer and config.norms.sandwich:
        return ScaledLayer if config.scales.layer_scalars else SandwichLayer
    return found
