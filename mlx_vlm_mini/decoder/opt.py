"""OPT, the decoder of BLIP-2: learned positions, layer norms, an MLP without a gate.

Source: arXiv:2205.01068; models/opt of huggingface/transformers. Its attention, caches and interface are the decoder's.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import OPTConfig
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.mlp import MLP
from mlx_vlm_mini.layers.types import Mask, Recorder

from .decoder import Decoder

OFFSET = 2  # positions in front of the first token's, which padding had


class OPTLayer(nn.Module):
    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        eps, bias = config.norms.rms_norm_eps, config.biases
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv_bias=bias.qkv_bias,
            o_bias=bias.o_bias,
            scale=config.head_dim**-0.5,
        )
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, *, mask: Mask, rope: Any, cache: Any, attentions: Recorder | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask=mask, rope=rope, cache=cache, attentions=attentions)
        return x + self.mlp(self.post_attention_layernorm(x))


class FirstOPTLayer(OPTLayer):
    """The first layer, which gives the embeddings their positions: so layers can be run one by one."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        self.pos_embed = mx.zeros((config.max_position_embeddings + OFFSET, config.hidden_size))

    def __call__(self, x: mx.array, *, mask: Mask, rope: Any, cache: Any, attentions: Recorder | None) -> mx.array:
        """
        Raises:
            PromptError: prompt and answer are longer than there are positions.
        """
        start = OFFSET + (0 if cache is None else cache.offset)
        if start + x.shape[1] > len(self.pos_embed):
            longest = len(self.pos_embed) - OFFSET
            raise PromptError(
                f"this model has positions for {longest} tokens, prompt and answer are more: shorten them"
            )
        x = x + self.pos_embed[start : start + x.shape[1]]
        return super().__call__(x, mask=mask, rope=rope, cache=cache, attentions=attentions)


class OPTDecoder(Decoder):
    def __init__(self, config: OPTConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [(OPTLayer if number else FirstOPTLayer)(config) for number in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norms.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = None
