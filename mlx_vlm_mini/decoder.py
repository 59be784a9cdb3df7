"""The decoder: embeddings -> logits.

Source: LLaMA (arXiv:2302.13971). Mistral (arXiv:2310.06825) adds grouped queries and a sliding window, Qwen2
(arXiv:2407.10671) biases on queries, keys and values. Modules are named as Hugging Face names them.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .activation import ACTIVATIONS
from .attention import Attention, Mask
from .config import DecoderConfig
from .rope import make_rope


def causal_mask(num_queries: int, offset: int, window: int | None) -> Mask:
    """What `num_queries` tokens after `offset` cached ones may look at: themselves and what stands before them.

    With a window of 3, queries 2 and 3 of 4 tokens see

        key    0 1 2 3
        2      x x x .
        3      . x x x

    Returns:
        None or "causal" where the fused attention needs no array, else bool[num_queries, offset + num_queries].
    """
    if window is None or offset + num_queries <= window:
        return None if num_queries == 1 else "causal"
    queries = mx.arange(offset, offset + num_queries)[:, None]
    keys = mx.arange(offset + num_queries)
    return (keys <= queries) & (keys > queries - window)


class MLP(nn.Module):
    """The gated MLP of "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self, x: mx.array, *, mask: Mask, rope: Any, cache: Any, attentions: list[mx.array] | None
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask=mask, rope=rope, cache=cache, attentions=attentions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = make_rope(config)

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Any] | None = None,
        attentions: list[mx.array] | None = None,
    ) -> mx.array:
        """Run the layers and the final norm; `logits` turns rows of the result into scores.

        Args:
            embeddings: float[B, L, C].
            cache: one of mlx-lm's KV caches a layer; these L tokens are appended to it.
            attentions: where given, each layer appends its weights float[B, H, L, S].

        Returns:
            float[B, L, C].
        """
        config = self.config
        caches: Sequence[Any] = [None] * len(self.layers) if cache is None else cache
        offset = 0 if caches[0] is None else caches[0].offset
        masks = {
            "full_attention": causal_mask(embeddings.shape[1], offset, None),
            "sliding_attention": causal_mask(embeddings.shape[1], offset, config.sliding_window),
        }
        x = embeddings
        for layer, kind, layer_cache in zip(self.layers, config.layer_types, caches, strict=True):
            x = layer(x, mask=masks[kind], rope=self.rope, cache=layer_cache, attentions=attentions)
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """float[B, L, C] -> float[B, L, vocab_size]."""
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.embed_tokens.as_linear(hidden)
