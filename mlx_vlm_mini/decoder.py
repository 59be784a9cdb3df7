"""The decoder: embeddings -> logits.

Source: LLaMA (arXiv:2302.13971). Mistral (arXiv:2310.06825) adds grouped queries and a sliding window, Qwen2
(arXiv:2407.10671) biases on queries, keys and values, Qwen3 (arXiv:2505.09388) norms of each head's queries and keys,
Gemma 2 (arXiv:2408.00118) norms on both sides and caps, Llama 3.2 Vision (arXiv:2407.21783) layers that look at images,
QLLaMA (arXiv:2312.14238) layers in which query tokens do.
Modules are named as Hugging Face names them.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .activation import ACTIVATIONS
from .attention import Attention, Mask, Recorder
from .axes import PlacedImage, SectionedRoPE, add_taps, remember, turn_once
from .config import DecoderConfig, LayerType
from .cross_attention import CrossAttention, ImageCache, ShownImage, Sight, Span, look
from .image_blocks import ImageBlock, block_mask
from .query_attention import QueryAttention, QuerySight
from .rope import PromptRoPE, depends_on_length, make_rope


def causal_mask(num_queries: int, offset: int, window: int | None, prefix: int = 0) -> Mask:
    """What `num_queries` tokens after `offset` cached ones may look at: themselves and what stands before them.

    With a window of 3, queries 2 and 3 of 4 tokens see

        key    0 1 2 3
        2      x x x .
        3      . x x x

    The first `prefix` tokens of all see one another besides, in whatever window (arXiv:1910.10683, fig. 3).

    Returns:
        None or "causal" where the fused attention needs no array, else bool[num_queries, offset + num_queries].
    """
    total = offset + num_queries
    if prefix >= total:
        return None
    if prefix <= offset and (window is None or total <= window):
        return None if num_queries == 1 else "causal"
    queries, keys = mx.arange(offset, total)[:, None], mx.arange(total)
    seen = (keys <= queries) & (keys > queries - (total if window is None else window))
    return seen | ((queries < prefix) & (keys < prefix))


def rotating_mask(num_queries: int, offset: int, size: int, keep: int) -> Mask:
    """What `num_queries` tokens after `offset` others may look at where mlx-lm's rotating cache holds `size` tokens.

    Token t sees the first `keep` tokens and the last `size - keep` up to itself, in pieces of whatever length it is
    read. Several tokens find at most `size - 1` keys before theirs, in order; one finds those that it sees, in any
    order. (mlx-lm's own mask hides the first tokens from all of several queries but the first.)

    Returns:
        None where each query sees every key, else bool[num_queries, min(offset, size - 1) + num_queries].
    """
    if num_queries == 1:
        return None
    held = min(offset, size - 1)
    queries, keys = mx.arange(held, held + num_queries)[:, None], mx.arange(held + num_queries)
    return (keys <= queries) & ((keys > queries - (size - keep)) | (keys < keep))


class OffsetRMSNorm(nn.Module):
    """RMS norm whose weight is stored without an offset; in float32, as models/gemma of transformers computes it."""

    def __init__(self, dims: int, *, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = mx.zeros(dims)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.astype(mx.float32) + self.offset
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


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


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.num_embeddings, config.hidden_size)
        layer = SandwichLayer if config.norms.sandwich else DecoderLayer
        kinds: dict[LayerType, Any] = {"cross_attention": CrossAttentionLayer, "query_attention": QueryLayer}
        self.layers = [kinds.get(kind, layer)(config) for kind in config.layer_types]
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = make_rope(config)
        if config.window is not None and config.window.sliding_rope_theta is not None:
            self.sliding_rope = make_rope(config, config.window.sliding_rope_theta)
        if config.has_sections:
            self.rope = SectionedRoPE(self.rope, config)

    def embed(self, input_ids: mx.array) -> mx.array:
        """int[B, L] -> float[B, L, C]: the tokens' embeddings, scaled where the config says so."""
        # Embeddings in mxfp4 and its kin come out as bfloat16 whatever the rest of the model is.
        embeddings = self.embed_tokens(input_ids).astype(self.norm.weight.dtype)
        scale = self.config.scales.embed_scale
        return embeddings if scale == 1 else embeddings * mx.array(scale, dtype=embeddings.dtype)

    def reads_whole(self, length: int) -> bool:
        """Whether the keys of a prompt of this length depend on all of it.

        Then it cannot be read in pieces, nor can keys that were cached for a shorter one be used again.
        """
        return self.config.prefix_lm or depends_on_length(self.config, length)

    def rope_after(self, prompt: int) -> Any:
        """Rotary positions of a sequence that begins with a prompt of so many tokens."""
        return self.rope.begun(prompt) if isinstance(self.rope, PromptRoPE) else self.rope

    def keeps_keys(self, begun: int | None, held: int, length: int) -> bool:
        """Whether cached keys are those that a prompt of `length` tokens would give again.

        Args:
            begun: tokens of the prompt that the cached sequence began with; None where that is not known.
            held: tokens in the cache.
        """
        if begun is not None and isinstance(self.rope, PromptRoPE):
            return self.rope.step(begun) == self.rope.step(length)
        return not self.reads_whole(max(held, length))

    @property
    def least_chunk(self) -> int:
        """Tokens that the first chunk of a prompt must have: query tokens, which see one another."""
        return 1 if self.config.queries is None else self.config.queries.num_query_tokens

    @property
    def looks_ahead(self) -> bool:
        """Whether the keys of a prompt depend on images that come later (transformers' cross-attention)."""
        cross = self.config.cross_attention
        return cross is not None and cross.blind_rows == "attend"

    def show(self, number: int, images: Sequence[ShownImage], cache: ImageCache | None) -> ImageCache:
        """Show images to the cross-attention layer of this number; without a cache to it alone."""
        cache = ImageCache() if cache is None else cache
        if images:
            self.layers[number].show(images, cache)
        return cache

    def masks(
        self,
        length: int,
        offset: int = 0,
        prefix: int | None = None,
        spans: Sequence[Span] = (),
        whole: bool = False,
        features: mx.array | None = None,
        blocks: Sequence[ImageBlock] = (),
    ) -> dict[LayerType, Any]:
        """What `length` tokens after `offset` cached ones may look at, by kind of layer: a `Mask`, of cross-attention
        layers a `Sight` or None, of layers with query tokens a `QuerySight`.

        Args:
            prefix: as in a call.
            spans, whole: see `look`.
            features: float[1, P, C], what query tokens look at; None where none are among these tokens.
            blocks: images whose tokens see one another; none of them begins in these tokens and ends behind them.
        """
        if any(block.end > offset and block.start < offset + length for block in blocks):
            return {
                "full_attention": block_mask(length, offset, None, blocks),
                "sliding_attention": block_mask(length, offset, self.config.sliding_window, blocks),
            }
        if not self.config.prefix_lm:
            prefix = 0 if features is None else self.least_chunk
        elif prefix is None:
            prefix = 0 if offset else length
        full = causal_mask(length, offset, None, prefix)
        return {
            "full_attention": full,
            "query_attention": QuerySight(full, features),
            "sliding_attention": causal_mask(length, offset, self.config.sliding_window, prefix),
            "cross_attention": look(spans, length, offset, blind_attend=self.looks_ahead, whole=whole)
            if spans
            else None,
        }

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Any] | None = None,
        attentions: Recorder | None = None,
        prefix: int | None = None,
        images: Sequence[ShownImage | ImageBlock | PlacedImage] = (),
    ) -> mx.array:
        """Run the layers and the final norm; `logits` turns rows of the result into scores.

        Args:
            embeddings: float[B, L, C].
            cache: one of mlx-lm's KV caches a layer, an `ImageCache` a cross-attention layer; these L tokens are
                appended to it.
            attentions: where given, each layer appends its weights float[B, H, L, S], see `Recorder`; S are the tokens,
                in cross-attention layers the keys of all images.
            prefix: the prompt's tokens: they see one another where the config says `prefix_lm`, and decide on rotary
                positions that go by the prompt. By default those of the call that begins the sequence.
            images: new ones, for cross-attention layers; also those whose tokens only later calls read. Or the one
                that query tokens look at, which are all in this call, the first of it. Or images whose tokens see one
                another, none of which is read in two calls. Or, as `PlacedImage`s, all of the prompt, which the cache
                remembers.

        Returns:
            float[B, L, C].
        """
        caches: list[Any] = [None] * len(self.layers) if cache is None else list(cache)
        spans: tuple[Span, ...] = ()
        shown = [image for image in images if isinstance(image, ShownImage)]
        blocks = [image for image in images if isinstance(image, ImageBlock)]
        for number, kind in enumerate(self.config.layer_types):
            if kind == "cross_attention":
                caches[number] = self.show(number, shown, caches[number])
                spans = caches[number].spans
        first = next(each for each in caches if not isinstance(each, ImageCache))  # all are as long
        offset = 0 if first is None else first.offset
        features = shown[0].features[None] if shown and self.config.queries is not None else None
        masks = self.masks(embeddings.shape[1], offset, prefix, spans, attentions is not None, features, blocks)
        if hasattr(first, "max_size"):
            rotating = rotating_mask(embeddings.shape[1], offset, first.max_size, first.keep)
            masks |= {"full_attention": rotating, "sliding_attention": rotating}
        if prefix is None:
            prefix = getattr(first, "prompt_length", 0) if offset else embeddings.shape[1]
        if first is not None:  # the cache remembers it, as the keys that it holds were turned by it
            first.prompt_length = prefix
        placed = remember([image for image in images if isinstance(image, PlacedImage)], first)
        ropes = self.ropes(placed, offset, embeddings.shape[1], prefix)
        x = embeddings
        for number, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            x = layer(x, mask=masks[kind], rope=ropes[kind], cache=caches[number], attentions=attentions)
            x = add_taps(x, number, placed, offset)
        return self.norm(x)

    def ropes(self, images: Sequence[PlacedImage], offset: int, length: int, prompt: int) -> dict[LayerType, Any]:
        """By kind of layer what turns `length` tokens behind `offset` others of a sequence with these images, which
        begins with a prompt of so many tokens."""
        among = images and isinstance(self.rope, SectionedRoPE)
        usual = self.rope.among(images, offset, length) if among else turn_once(self.rope_after(prompt), offset, length)
        sliding = turn_once(self.sliding_rope, offset, length) if "sliding_rope" in self else usual
        return {kind: sliding if kind == "sliding_attention" else usual for kind in self.config.layer_types}

    def logits(self, hidden: mx.array) -> mx.array:
        """float[B, L, C] -> float[B, L, vocab_size]."""
        logits = self.lm_head(hidden) if "lm_head" in self else self.embed_tokens.as_linear(hidden)
        cap = self.config.scales.final_logit_softcapping
        return logits if cap is None else cap * mx.tanh(logits / cap)
